"""The op set: everything the decoder may say, and who says it how.

`contract` states the ops; `reference` is the oracle in plain torch. The decoder speaks only ops,
so another op set (native CPU, Triton) runs every model without a change upstairs.
"""
