"""A load generator: clients that cost little and check what they get, in processes of their own.

For `steward load` and for Steward's benchmarks. It sees a cluster from outside, by the wire
protocol alone; `steward.load.agent:load` is the agent that makes the events.
"""
