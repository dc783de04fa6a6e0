#!/usr/bin/env python3
"""Writes crates/bitnet-inference/tests/golden/chat/golden.json: what transformers renders of the templates beside it.

    scripts/make-chat-golden.py            (with the python of scripts/python-truth --print-python)

The templates are in our own words and behave as those of the models that they are named after. `golden.json` holds the
conversations and, for each template, the text of each of them, or null where the template refuses it.
"""

import datetime
import json
from pathlib import Path

from transformers.utils import chat_template_utils

FOLDER = Path(__file__).resolve().parents[1] / "crates/bitnet-inference/tests/golden/chat"
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
NOW = datetime.datetime(2026, 3, 5, 14, 7, 9, 12345)

TOOLS = [
    {"type": "function", "function": {
        "name": "weather", "description": "The weather <now> & here, it's \"exact\"",
        "parameters": {"type": "object", "required": ["place"], "properties": {
            "place": {"type": "string", "description": "A town, für example Zürich"},
            "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
            "days": {"type": "array", "items": {"type": "integer"}},
            "more": {"type": "object", "properties": {"wind": {"type": "boolean", "default": False}}}}}}},
    {"type": "function", "function": {"name": "noop", "description": "Nothing", "parameters": {"type": "object", "properties": {}}}},
]
SYSTEM = {"role": "system", "content": " Be <brief> & kind. \n"}
USER = {"role": "user", "content": " Grüße, 'you' & <you>!\n"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello \"you\" 😀"}
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "id": "call00001", "function": {"name": "weather", "arguments": {"place": "Zürich", "days": [1, 2]}}}]}
RESULT = {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "{\"degrees\": 21.5}"}

CONVERSATIONS = {
    "question": ([USER], None),
    "system": ([SYSTEM, USER], None),
    "turns": ([SYSTEM, USER, ANSWER, {"role": "user", "content": "And now?"}], None),
    "no-system": ([USER, ANSWER, {"role": "user", "content": "And now?"}], None),
    "tools": ([USER], TOOLS),
    "system-tools": ([SYSTEM, USER], TOOLS),
    "called": ([SYSTEM, USER, CALL, RESULT], TOOLS),
    "answered": ([USER, CALL, RESULT, ANSWER, {"role": "user", "content": "Thanks"}], TOOLS),
    "wrong-order": ([USER, USER], None),
}


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


def render(template, messages, tools):
    chat_template_utils.datetime = Clock
    try:
        return chat_template_utils.render_jinja_template(
            conversations=[messages], tools=tools, chat_template=template, add_generation_prompt=True, **SPECIALS)[0][0]
    except Exception as error:
        print("  refused:", error)
        return None


def main():
    golden = {"specials": SPECIALS, "now": NOW.isoformat(timespec="microseconds"),
              "conversations": {name: {"messages": m, "tools": t} for name, (m, t) in CONVERSATIONS.items()}, "templates": {}}
    for path in sorted(FOLDER.glob("*.jinja")):
        template = path.read_text(encoding="utf-8")
        print(path.stem)
        golden["templates"][path.stem] = {name: render(template, m, t) for name, (m, t) in CONVERSATIONS.items()}
    text = json.dumps(golden, ensure_ascii=False, indent=1) + "\n"
    (FOLDER / "golden.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
