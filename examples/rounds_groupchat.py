"""A group chat whose members speak in turn, as in AutoGen's RoundRobinGroupChat, with OpenAI's client and nothing more.

    kvarn serve --port 8000
    python examples/rounds_groupchat.py --base-url http://127.0.0.1:8000/v1

Every member reads all that the others have said, behind its own instructions. Those words are marked as shared: the
server computes them once, and not for each of them. Nobody waits for anybody else's request here, so no round is named.
"""

from __future__ import annotations

import argparse

from openai import OpenAI

from kvarn.clients.rounds import transcript_messages

MEMBERS = {
    "editor": "You are the editor of a village paper. You ask for facts and cut what is long.",
    "reporter": "You are a reporter. You were at the river this morning and saw the bridge closed.",
    "critic": "You are a critic. You find what is missing in what the others say.",
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    options.add_argument("--model", default="smollm2")
    options.add_argument("--turns", type=int, default=6, help="answers in all")
    chosen = options.parse_args()
    client = OpenAI(base_url=chosen.base_url, api_key="none")
    transcript = [("user", "Write a short notice about the closed footbridge together.")]
    for turn in range(chosen.turns):
        me = list(MEMBERS)[turn % len(MEMBERS)]
        messages = transcript_messages(MEMBERS[me], transcript, me, f"It is your turn, {me}. Speak briefly.")
        answer = client.chat.completions.create(
            model=chosen.model,
            messages=messages,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=48,
        )
        said = answer.choices[0].message.content or "..."
        transcript.append((me, said))
        usage = answer.usage
        there = usage.prompt_tokens_details.cached_tokens if usage and usage.prompt_tokens_details else 0
        print(f"{me}: {there} of {usage.prompt_tokens if usage else 0} prompt tokens were there already")
        print(f"{me}: {said!r}")


if __name__ == "__main__":
    main()
