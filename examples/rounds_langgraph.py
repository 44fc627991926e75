"""A LangGraph of agents that work in rounds: in each, all speak at once, having read what all said in the last.

    kvarn serve --port 8000
    python examples/rounds_langgraph.py --base-url http://127.0.0.1:8000/v1

Needs the extra: pip install 'kvarn[agents]'. The server is told what the agents share and which requests are of one
round. The bundled model is tiny: it makes little of it.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any, TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

from kvarn.clients.rounds import all_gather, round_field, round_messages
from kvarn.serving.rounds.hints import RoundHint

PEOPLE = {
    "Ada": "You are Ada, a baker who rises at four. You want the party to be over by ten.",
    "Bram": "You are Bram, a violinist. You know everybody in the street and wish to play for them.",
    "Cleo": "You are Cleo, who keeps the accounts of the club. There are sixty in the box, and no more.",
    "Dov": "You are Dov, a cook. You have never fed more than twenty, and would like to.",
}


class Talk(TypedDict):
    """The graph's state."""

    said: dict[str, str]
    """What each has said in the last round."""
    rounds: int
    """How many there have been."""


def drawing(model: ChatOpenAI, rounds: int) -> Any:
    """A step in which all speak, and a way back to it."""

    async def speak(state: Talk, hint: RoundHint) -> str:
        task = f"Say in one sentence what you will do for the party. You are {hint.agent}."
        answer = await model.ainvoke(
            round_messages(PEOPLE[hint.agent], state["said"], task), extra_body=round_field(hint)
        )
        print(f"round {state['rounds'] + 1}, {hint.agent}: {answer.content!r}")
        return str(answer.content)

    everybody = all_gather(dict.fromkeys(PEOPLE, speak), name="party")

    async def one_round(state: Talk) -> dict[str, Any]:
        return {**await everybody(state), "rounds": state["rounds"] + 1}

    graph = StateGraph(Talk)
    graph.add_node("round", one_round)
    graph.add_edge(START, "round")
    graph.add_conditional_edges("round", lambda state: END if state["rounds"] == rounds else "round", ["round", END])
    return graph.compile()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    options.add_argument("--model", default="smollm2")
    options.add_argument("--rounds", type=int, default=3)
    chosen = options.parse_args()
    model = ChatOpenAI(base_url=chosen.base_url, api_key="none", model=chosen.model, temperature=0, max_tokens=48)
    opening: Talk = {"said": {"Host": "The party is on the fourteenth of February."}, "rounds": 0}
    state = asyncio.run(drawing(model, chosen.rounds).ainvoke(opening))
    print(f"after {state['rounds']} rounds: {', '.join(state['said'])} have spoken")


if __name__ == "__main__":
    main()
