import time, pytest
from tests.deployment.conftest import *

pytestmark = pytest.mark.slow


def test_a(federation):
    one = federation(rounds=3, quorum=1.0, deadline="60s")
    t = time.monotonic()

    def p(*a):
        print(f"{time.monotonic() - t:.1f}", *a)

    one.federate("inline").ends()
    p("inline")
    s = one.serve("dep")
    p("ready")
    js = one.join_all()
    for j in js.values():
        j.says("Ready:")
        p("ready join")
    one.opened("dep", 1)
    p("1 opened")
    one.opened("dep", 2)
    p("2 opened")
    one.opened("dep", 3)
    p("3 opened")
    print(
        [(x, open(f"/proc/{x}/cmdline").read().replace("\0", " ")[:150]) for x in s.family() + js["animals"].family()]
    )
    s.ends()
    p("serve end")
    for j in js.values():
        j.ends()
    p("join end")
    print(s.said)
    print(js["animals"].said)
    assert one.adapter("inline") == one.adapter("dep")
