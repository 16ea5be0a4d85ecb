from metric_world import noise, root, small_world, trunk  # noqa: F401
