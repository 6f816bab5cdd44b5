"""Pure decisions: no I/O, no clock, no chance of its own.

Everything here is a synchronous function or a small state machine over values that can be
printed. Time comes in as ``now_ms`` and chance as ``draw``; neither is fetched. The router, the
serving pod, the tests and the simulator all run these same objects.
"""
