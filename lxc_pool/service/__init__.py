"""The service: who may do what (`access`), connections (`server`, `session`), the pool and what it drives.

A request flows: `server` accepts → `session` decodes → `service.PoolService` checks → `pool.Pool` decides. Work flows:
`Pool` decides → `dispatcher` hands over → a `lane`'s worker process calls the `backend`.
"""
