"""Running commands inside containers: the agent that the service starts, and the processes it makes.

Nothing here copies a command's data: it reads and writes the client's own pipes. Files and trees are copied by
`operations`, at the other end of such pipes; client and container run the same code for it. Imports stay small, because
the agent forks for every command and the client shares `protocol`.
"""
