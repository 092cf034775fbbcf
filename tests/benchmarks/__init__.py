"""Side-by-side measurements of mqlib, the raw clients and Kafka's own tools: `python3 -m mqlib bench`.

Each module but `core` is one benchmark: its `contenders` prepares what all of them need, yields them, and cleans up.
"""
