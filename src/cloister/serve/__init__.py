"""The query service, and the client that attests it before it asks.

`wire` and `answer` are pure; `pool` runs the model's program in jails, `service` answers HTTP, `client` asks.
"""
