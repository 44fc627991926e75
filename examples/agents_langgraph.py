"""A LangGraph agent with a slow tool, on a kvarn server that is told when the tool starts and ends.

    kvarn serve --port 8000
    python examples/agents_langgraph.py --base-url http://127.0.0.1:8000/v1

Needs the extra: pip install 'kvarn[agents]'. The bundled model is tiny: it has to be made to call the tool
(tool_choice), and it makes little of the answer.
"""

from __future__ import annotations

import argparse
import time
import uuid

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition

from kvarn.clients.events import AgentEvents, request_extras
from kvarn.clients.langgraph import ToolEvents, from_langgraph

ROUNDS = 3
"""Calls of the model at most."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    options.add_argument("--model", default="smollm2")
    options.add_argument("--tool-seconds", type=float, default=2.0)
    chosen = options.parse_args()
    model = ChatOpenAI(base_url=chosen.base_url, api_key="none", model=chosen.model, temperature=0, max_tokens=128)
    program = f"weather-{uuid.uuid4().hex[:8]}"

    @tool
    def search_web(query: str) -> str:
        """Search the web."""
        time.sleep(chosen.tool_seconds)
        return "Oslo: light rain, 7 degrees, wind from the west."

    def ask(state: MessagesState) -> MessagesState:
        """The first time the model must call the tool, the last time it must not. The tools stay the same meanwhile:
        they are part of the prompt, and another prompt finds none of what was computed."""
        turn = 1 + sum(message.type == "ai" for message in state["messages"])
        node = "model" if turn == 1 else f"model#{turn}"
        choice = "required" if turn == 1 else "none" if turn == ROUNDS else "auto"
        asking = model.bind_tools([search_web], tool_choice=choice, parallel_tool_calls=False)
        answer = asking.invoke(state["messages"], **request_extras(plan.hints(node, program)))
        found = answer.usage_metadata["input_token_details"].get("cache_read", 0)
        print(f"{node}: {found} of {answer.usage_metadata['input_tokens']} prompt tokens were there already")
        print(f"{node}: {[call['args'] for call in answer.tool_calls] or answer.content!r}")
        return {"messages": [answer]}

    drawing = StateGraph(MessagesState)
    drawing.add_node("model", ask)
    drawing.add_node("tools", ToolNode([search_web]))
    drawing.add_edge(START, "model")
    drawing.add_conditional_edges("model", tools_condition, ["tools", END])
    drawing.add_edge("tools", "model")
    compiled = drawing.compile()

    plan = from_langgraph(compiled, name="weather", rounds=ROUNDS, seconds={"tools": chosen.tool_seconds}).plan()
    for node in plan.nodes.values():
        print(f"plan: {node.name}: {node.seconds} s, {node.remaining_seconds} s to the end, tool: {node.tool or '-'}")

    question = {"messages": [("user", "What is the weather in Oslo? Search the web.")]}
    with AgentEvents(chosen.base_url) as events:
        heard = ToolEvents(events, program=program, tool_seconds={search_web.name: chosen.tool_seconds})
        state = compiled.invoke(question, {"callbacks": [heard]})
    print("answer:", state["messages"][-1].content)


if __name__ == "__main__":
    main()
