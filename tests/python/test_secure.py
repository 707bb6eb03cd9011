"""A Python client over TLS with a token: grpcio's own credentials, which share no code with the server's.

LACUNA_ADDRESS, LACUNA_CA and LACUNA_TOKEN say where the server is, who issued its certificate, and who calls.
"""

import os
import pathlib
import sys
import unittest

import grpc

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
from test_service import STUBS, generation, models  # noqa: E402

ADDRESS = os.environ["LACUNA_ADDRESS"]


def channel(token=None):
    tls = grpc.ssl_channel_credentials(root_certificates=pathlib.Path(os.environ["LACUNA_CA"]).read_bytes())
    if token is None:
        return grpc.secure_channel(ADDRESS, tls)
    return grpc.secure_channel(ADDRESS, grpc.composite_channel_credentials(tls, grpc.access_token_call_credentials(token)))


class Secure(unittest.TestCase):
    def test_a_token_is_let_in(self):
        with channel(os.environ["LACUNA_TOKEN"]) as open_channel:
            stub = STUBS["generation"].GenerationStub(open_channel)
            request = generation.GenerateRequest(text="x", stopping=generation.Stopping(max_new_tokens=4))
            events = list(stub.Generate(request, timeout=120))
            self.assertTrue(events[-1].HasField("finished"))
            listed = STUBS["models"].ModelsStub(open_channel).List(models.ListModelsRequest(), timeout=120)
            self.assertEqual(listed.caller.name, "python")
            self.assertGreater(listed.limits.connections_max, 0)

    def test_others_are_not(self):
        for token in (None, "lacuna_wrong"):
            with channel(token) as closed, self.assertRaises(grpc.RpcError) as raised:
                STUBS["models"].ModelsStub(closed).List(models.ListModelsRequest(), timeout=120)
            self.assertEqual(raised.exception.code(), grpc.StatusCode.UNAUTHENTICATED)

    def test_nobody_speaks_in_the_clear(self):
        with grpc.insecure_channel(ADDRESS) as clear, self.assertRaises(grpc.RpcError) as raised:
            STUBS["models"].ModelsStub(clear).List(models.ListModelsRequest(), timeout=120)
        self.assertEqual(raised.exception.code(), grpc.StatusCode.UNAVAILABLE)


if __name__ == "__main__":
    unittest.main()
