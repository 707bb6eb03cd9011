"""The service as a Python client sees it: stubs generated from the published proto files, and grpcio, which shares no code with
the server.

The server's address comes from LACUNA_ADDRESS. Run it by itself with

    LACUNA_ADDRESS=127.0.0.1:50051 python tests/python/test_service.py
"""

import importlib
import os
import pathlib
import sys
import tempfile
import threading
import time
import unittest

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 120
PROMPT = "Write a function that adds two numbers.\n"


def generate_stubs():
    """Compiles proto/ into a temporary folder and imports the result."""
    folder = tempfile.TemporaryDirectory(prefix="lacuna-stubs-")
    protos = sorted((ROOT / "proto" / "lacuna" / "v1").glob("*.proto"))
    out = folder.name
    arguments = ["protoc", f"-I{ROOT / 'proto'}", f"--python_out={out}", f"--grpc_python_out={out}"]
    if protoc.main(arguments + [str(proto) for proto in protos]) != 0:
        raise SystemExit("the proto files do not compile")
    sys.path.insert(0, out)
    names = ("generation", "models", "tokenization")
    modules = {name: importlib.import_module(f"lacuna.v1.{name}_pb2") for name in names}
    stubs = {name: importlib.import_module(f"lacuna.v1.{name}_pb2_grpc") for name in names}
    return folder, modules, stubs


FOLDER, MODULES, STUBS = generate_stubs()
generation, models, tokenization = MODULES["generation"], MODULES["models"], MODULES["tokenization"]


def request(**fields):
    return generation.GenerateRequest(**{"text": PROMPT, **fields})


def long_request(steps=200):
    diffusion = generation.Diffusion(steps=steps, block_length=200, suppress_end=True, finish_early=False)
    return request(diffusion=diffusion, stopping=generation.Stopping(max_new_tokens=200))


def replay(events):
    """The final canvas, None where it is still masked."""
    canvas = [None if cell.masked else cell.token_id for cell in events[0].started.canvas]
    for event in events:
        for edit in event.step.edits:
            if edit.status in (generation.EDIT_STATUS_COMMITTED, generation.EDIT_STATUS_EDITED):
                canvas[edit.position] = edit.token_id
            elif edit.status == generation.EDIT_STATUS_REMASKED:
                canvas[edit.position] = None
    return canvas


def committed(events):
    return [event.committed for event in events if event.WhichOneof("event") == "committed"]


class ServiceTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.channel = grpc.insecure_channel(os.environ["LACUNA_ADDRESS"])
        grpc.channel_ready_future(cls.channel).result(timeout=PATIENCE_SECONDS)
        cls.generation = STUBS["generation"].GenerationStub(cls.channel)
        cls.models = STUBS["models"].ModelsStub(cls.channel)
        cls.tokenization = STUBS["tokenization"].TokenizationStub(cls.channel)

    @classmethod
    def tearDownClass(cls):
        cls.channel.close()

    def generate(self, message):
        return list(self.generation.Generate(message, timeout=PATIENCE_SECONDS))

    def refused(self, message, timeout=PATIENCE_SECONDS):
        with self.assertRaises(grpc.RpcError) as caught:
            list(self.generation.Generate(message, timeout=timeout))
        return caught.exception

    def test_commits_join_to_the_text_and_edits_replay_to_the_canvas(self):
        events = self.generate(request())
        self.assertEqual(events[0].WhichOneof("event"), "started")
        self.assertEqual(events[-1].WhichOneof("event"), "finished")
        ids = [token for commit in committed(events) for token in commit.token_ids]
        text = "".join(commit.text for commit in committed(events))
        canvas = replay(events)
        self.assertEqual(ids, canvas[: len(ids)])
        shown = self.tokenization.Detokenize(tokenization.DetokenizeRequest(token_ids=ids)).text
        self.assertEqual(text, shown)
        usage = events[-1].finished.usage
        self.assertEqual(usage.prompt_tokens, events[0].started.prompt_tokens)
        self.assertEqual(usage.steps, sum(event.WhichOneof("event") == "step" for event in events))

    def test_greedy_texts_are_alike(self):
        first, second = (committed(self.generate(request(step_events=False))) for _ in range(2))
        self.assertEqual(first, second)

    def test_infill_keeps_fixed_text(self):
        pieces = [
            generation.TemplatePiece(text="def add("),
            generation.TemplatePiece(hole=4),
            generation.TemplatePiece(text="):\n    return "),
            generation.TemplatePiece(hole=4),
        ]
        events = self.generate(request(template=pieces))
        canvas = replay(events)
        for position, cell in enumerate(events[0].started.canvas):
            if not cell.masked:
                self.assertEqual(canvas[position], cell.token_id)

    def test_lanes_are_compared(self):
        lanes = [
            generation.Lane(name="four", diffusion=generation.Diffusion(steps=4)),
            generation.Lane(sampling=generation.Sampling(temperature=0.5, seed=1)),
        ]
        message = generation.CompareRequest(text=PROMPT, lanes=lanes, reference="x", step_events=False)
        events = list(self.generation.Compare(message, timeout=PATIENCE_SECONDS))
        self.assertEqual([event.lane for event in events], sorted(event.lane for event in events))
        summaries = [event.summary for event in events if event.HasField("summary")]
        name = self.models.List(models.ListModelsRequest()).models[0].name
        self.assertEqual([summary.name for summary in summaries], ["four", name])
        alone = committed(self.generate(request(diffusion=generation.Diffusion(steps=4))))
        self.assertEqual(summaries[0].text, "".join(commit.text for commit in alone))
        for summary in summaries:
            self.assertFalse(summary.HasField("error") or summary.HasField("likelihood"))
            self.assertGreater(summary.reference_match.edit_distance, 0)
        lanes[1].diffusion.steps = 2**63
        with self.assertRaises(grpc.RpcError) as caught:
            list(self.generation.Compare(generation.CompareRequest(text=PROMPT, lanes=lanes), timeout=PATIENCE_SECONDS))
        self.assertTrue(caught.exception.details().startswith("lanes[1].diffusion.steps:"), caught.exception.details())

    def test_bad_input_is_refused_by_name(self):
        invalid, missing = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
        cases = [
            (generation.GenerateRequest(), invalid, "prompt"),
            (request(sampling=generation.Sampling(temperature=float("nan"))), invalid, "sampling.temperature"),
            (request(diffusion=generation.Diffusion(steps=2**63)), invalid, "diffusion.steps"),
            (request(diffusion=generation.Diffusion(order=99)), invalid, "diffusion.order"),
            (request(template=[generation.TemplatePiece()]), invalid, "template[0]"),
            (request(template=[generation.TemplatePiece(hole=0)]), invalid, "template"),
            (request(request_id="two words"), invalid, "request_id"),
            (request(text="many words " * 500), invalid, "stopping.max_new_tokens"),
            (generation.GenerateRequest(token_ids=generation.TokenIds(token_ids=[2**32 - 1])), invalid, "token_ids"),
            (request(model="gpt"), missing, "model"),
            (request(text="x" * (5 << 20)), grpc.StatusCode.RESOURCE_EXHAUSTED, "the request is too large"),
        ]
        for message, code, field in cases:
            with self.subTest(field=field):
                error = self.refused(message)
                self.assertEqual(error.code(), code, error.details())
                self.assertTrue(error.details().startswith(field + ":"), error.details())
        self.generate(request())

    def test_malformed_protobuf_is_an_invalid_argument(self):
        raw = self.channel.unary_stream("/lacuna.v1.Generation/Generate")
        for data in (b"\x1a\x02\xff\xfe", b"\x1a\x7f", b"\x00\x01", b"\xff"):
            with self.subTest(data=data), self.assertRaises(grpc.RpcError) as caught:
                list(raw(data, timeout=PATIENCE_SECONDS))
            self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT, caught.exception.details())

    def test_a_deadline_ends_the_stream(self):
        begun = time.monotonic()
        error = self.refused(long_request(), timeout=0.2)
        self.assertEqual(error.code(), grpc.StatusCode.DEADLINE_EXCEEDED)
        self.assertLess(time.monotonic() - begun, 30)

    def test_cancelling_ends_the_stream(self):
        call = self.generation.Generate(long_request(), timeout=PATIENCE_SECONDS)
        self.assertEqual(next(call).WhichOneof("event"), "started")
        call.cancel()
        with self.assertRaises(grpc.RpcError) as caught:
            list(call)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.CANCELLED)

    def test_streams_run_side_by_side(self):
        alone = committed(self.generate(request(step_events=False)))
        results = [None] * 4

        def run(index):
            results[index] = committed(self.generate(request(step_events=False)))

        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        text = "".join(commit.text for commit in alone)
        for commits in results:
            self.assertEqual("".join(commit.text for commit in commits), text)

    def test_models_and_tokens(self):
        listed = self.models.List(models.ListModelsRequest())
        self.assertGreater(listed.limits.steps_max, 0)
        name = listed.models[0].name
        found = self.models.Get(models.GetModelRequest(name=name)).model
        # What other programs leave free differs from call to call.
        for model in (found, listed.models[0]):
            model.processor.ClearField("memory_free_bytes")
        self.assertEqual(found, listed.models[0])
        tokens = self.tokenization.Tokenize(tokenization.TokenizeRequest(text=PROMPT)).tokens
        self.assertEqual("".join(token.text for token in tokens), PROMPT)

    def test_health_is_serving(self):
        health = health_pb2_grpc.HealthStub(self.channel)
        for status in health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_SECONDS):
            if status.status == health_pb2.HealthCheckResponse.SERVING:
                break
        for service in ("lacuna.v1.Generation", "lacuna.v1.Models", "lacuna.v1.Tokenization"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service))
            self.assertEqual(answer.status, health_pb2.HealthCheckResponse.SERVING, service)

    def test_reflection_knows_the_services(self):
        database = ProtoReflectionDescriptorDatabase(self.channel)
        services = set(database.get_services())
        self.assertLessEqual({"lacuna.v1.Generation", "lacuna.v1.Models", "lacuna.v1.Tokenization"}, services)
        self.assertEqual(database.FindFileContainingSymbol("lacuna.v1.GenerateRequest").package, "lacuna.v1")


if __name__ == "__main__":
    unittest.main(verbosity=2)
