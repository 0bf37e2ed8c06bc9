"""Running commands inside containers: the agent that the service starts, and the processes it makes.

Nothing here copies data: a command reads and writes the client's own pipes. Imports stay small, because the agent forks
for every command and the client shares `protocol`.
"""
