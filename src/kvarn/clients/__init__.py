"""For applications that talk to a server: events of their tool calls, and adapters for frameworks of agents.

Runs in the application's process, not in the server's. Each adapter imports its framework; the extra `agents` has both.
"""
