"""A gateway in a process of its own, over TLS, before a stand-in of Flower's SuperLink; for tests under load.

$ python -m tests.deployment.gateway_process FOLDER

FOLDER holds `keys` and `proxy`. Prints the port. As soon as FOLDER/orders is there, every node has an order.
"""

import hashlib
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse, PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree

from fedproxy.config import LLM, Compress, Experiment
from fedproxy.deployment.audit import Audit
from fedproxy.deployment.flower.announced import Announced
from fedproxy.deployment.flower.fleet import Fleet
from fedproxy.deployment.gateway import Gateway, Upstream
from fedproxy.deployment.handout.parts import describe
from fedproxy.deployment.members import Members
from fedproxy.federation.offer import make_offer

EXPERIMENT = Experiment(name="load", llm=LLM("llm"), compress=Compress(calibration="text"))


def node_of(key: bytes) -> int:
    return int.from_bytes(hashlib.sha256(key).digest()[:6], "big")


def main(folder: Path) -> None:
    given = set()

    class SuperLink(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            answer: ActivateNodeResponse | PullMessagesResponse = PullMessagesResponse()
            if self.path.endswith("activate-node"):
                answer = ActivateNodeResponse(node_id=node_of(ActivateNodeRequest.FromString(body).public_key))
            elif self.path.endswith("pull-messages") and (folder / "orders").exists():
                number = PullMessagesRequest.FromString(body).node.node_id
                if number not in given:
                    given.add(number)
                    head = Metadata(message_id=f"order-{number}", run_id=1, src_node_id=1, dst_node_id=number)
                    answer.messages_list.append(Message(metadata=head))
                    answer.message_object_trees.append(ObjectTree(object_id=f"order-{number}"))
            content = answer.SerializeToString()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

    superlink = Server(("127.0.0.1", 0), SuperLink)
    threading.Thread(target=superlink.serve_forever, daemon=True).start()
    keys, listing = folder / "keys", describe(folder / "proxy")
    (folder / "run").mkdir()
    gateway = Gateway(
        folder / "proxy",
        listing,
        "127.0.0.1",
        0,
        keys / "server.crt",
        keys / "server.key",
        members=Members(keys, folder / "run"),
        offer=lambda name, spoken: make_offer(
            EXPERIMENT, name, run_id="r1", proxy=listing.sha256, start="1" * 64, spoken=spoken
        ),
        upstream=Upstream(superlink.server_address[1], None),
        fleet=Fleet(Announced(folder), 1 << 20, 2.0),
        audit=Audit(folder / "run" / "audit.jsonl"),
        verdict=lambda name: None,
    )
    with gateway:
        sys.stdout.write(f"{gateway.port}\n")
        sys.stdout.flush()
        time.sleep(300)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
