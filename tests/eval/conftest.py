from metric_world import noise, root, small_world  # noqa: F401
