"""A task of the user's own rows: `task.name=jsonl`, with rewards by name, function or service."""
