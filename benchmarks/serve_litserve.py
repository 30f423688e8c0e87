"""LitServe server with one worker, for `benchmarks.serve`: ``python -m benchmarks.serve_litserve MODEL PORT``."""

import sys

import litserve
from fastapi import Request
from starlette.responses import Response

from benchmarks.serve import OnePhoto


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self._work = OnePhoto(sys.argv[1])

    def decode_request(self, request: Request) -> bytes:
        return bytes(request["image"].file.read())

    def predict(self, photo: bytes) -> bytes:
        return self._work(photo)

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="application/json")


if __name__ == "__main__":
    server = litserve.LitServer(Api(api_path="/v1/segment"), accelerator="cpu", workers_per_device=1)
    server.run(port=int(sys.argv[2]), host="127.0.0.1", generate_client_file=False)
