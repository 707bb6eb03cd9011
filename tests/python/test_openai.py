"""The HTTP API as OpenAI's own client for Python sees it.

The server's address comes from LACUNA_URL; it serves nano and nano-ar. Run it by itself with

    LACUNA_URL=http://127.0.0.1:8080 python tests/python/test_openai.py
"""

import asyncio
import os
import unittest

import openai

URL = os.environ["LACUNA_URL"] + "/v1"
TASK = "# Return the sum of the numbers in xs that are greater than 17.\ndef solve(xs):\n"
ANSWER = "    return sum(x for x in xs if x > 17)\n"
MESSAGES = [{"role": "user", "content": TASK}]


def client(**options):
    return openai.OpenAI(base_url=URL, api_key="none", max_retries=0, timeout=120, **options)


class Chat(unittest.TestCase):
    def test_whole(self):
        for model in ("nano", "nano-ar"):
            chat = client().chat.completions.create(model=model, messages=MESSAGES)
            self.assertEqual(chat.choices[0].message.content, ANSWER)
            self.assertEqual((chat.choices[0].finish_reason, chat.choices[0].message.role), ("stop", "assistant"))
            self.assertEqual(chat.usage.prompt_tokens + chat.usage.completion_tokens, chat.usage.total_tokens)
            self.assertGreater(chat.usage.model_extra["lacuna"]["tokens_per_forward"], 0)
            # What came back can be sent again.
            again = MESSAGES + [chat.choices[0].message, {"role": "user", "content": TASK}]
            chat = client().chat.completions.create(model=model, messages=again)
            self.assertEqual(chat.choices[0].message.content, ANSWER)

    def test_streamed(self):
        for model in ("nano", "nano-ar"):
            stream = client().chat.completions.create(
                model=model, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
            )
            text, reasons, usage = "", [], None
            for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    text += choice.delta.content or ""
                    reasons += [choice.finish_reason] if choice.finish_reason else []
            self.assertEqual((text, reasons), (ANSWER, ["stop"]))
            self.assertGreater(usage.completion_tokens, 10)

    def test_accumulated_by_the_client_itself(self):
        with client().chat.completions.stream(model="nano-ar", messages=MESSAGES, logprobs=True, top_logprobs=2) as stream:
            for _ in stream:
                pass
            chat = stream.get_final_completion()
        self.assertEqual(chat.choices[0].message.content, ANSWER)
        tokens = chat.choices[0].logprobs.content
        self.assertEqual("".join(token.token for token in tokens), ANSWER)
        self.assertTrue(all(len(token.top_logprobs) == 2 for token in tokens))

    def test_drafts(self):
        drafts = [
            chunk.choices[0].delta.content
            for chunk in client().chat.completions.create(
                model="nano",
                messages=MESSAGES,
                max_tokens=32,
                stream=True,
                extra_body={"diffusing": True, "lacuna": {"diffusion": {"steps": 8, "block_length": 8}}},
            )
        ]
        self.assertEqual((drafts[0], drafts[-1]), ("░" * 32, ANSWER))
        self.assertGreater(len(drafts), 3)

    def test_several_at_once(self):
        async def all_of_them():
            several = openai.AsyncOpenAI(base_url=URL, api_key="none", max_retries=0, timeout=120)
            asked = [
                several.chat.completions.create(model="nano", messages=MESSAGES, n=2, seed=seed, temperature=1.5)
                for seed in range(4)
            ]
            return await asyncio.gather(*asked)

        chats = asyncio.run(all_of_them())
        self.assertTrue(all([choice.index for choice in chat.choices] == [0, 1] for chat in chats))
        self.assertEqual(chats[0].choices[1].message.content, chats[1].choices[0].message.content)


class Completions(unittest.TestCase):
    def test_whole_and_streamed(self):
        asked = dict(model="nano-ar", prompt=TASK, stop=[" if"], logprobs=2)
        whole = client().completions.create(**asked)
        self.assertEqual((whole.choices[0].text, whole.choices[0].finish_reason), ("    return sum(x for x in xs", "stop"))
        self.assertEqual("".join(whole.choices[0].logprobs.tokens), whole.choices[0].text)
        streamed = client().completions.create(**asked, stream=True)
        self.assertEqual("".join(chunk.choices[0].text for chunk in streamed), whole.choices[0].text)

    def test_suffix(self):
        gap = client().completions.create(
            model="nano", prompt=TASK + "    return sum(", suffix=" if x > 17)\n", max_tokens=5
        )
        self.assertEqual(gap.choices[0].text, "x for x in xs")


class Rest(unittest.TestCase):
    def test_models(self):
        self.assertEqual([model.id for model in client().models.list()], ["nano", "nano-ar"])
        self.assertEqual(client().models.retrieve("nano").owned_by, "lacuna")

    def test_errors(self):
        with self.assertRaises(openai.BadRequestError) as wrong:
            client().chat.completions.create(model="nano", messages=MESSAGES, temperature=12)
        self.assertEqual((wrong.exception.param, wrong.exception.type), ("temperature", "invalid_request_error"))
        self.assertTrue(wrong.exception.request_id)
        with self.assertRaises(openai.NotFoundError) as unknown:
            client().completions.create(model="gpt-4o", prompt=TASK)
        self.assertEqual(unknown.exception.code, "model_not_found")
        with self.assertRaises(openai.BadRequestError) as tools:
            function = {"type": "function", "function": {"name": "f", "parameters": {}}}
            client().chat.completions.create(model="nano", messages=MESSAGES, tools=[function])
        self.assertEqual(tools.exception.param, "tools")


if __name__ == "__main__":
    unittest.main()
