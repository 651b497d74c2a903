"""The subcommands of `cud` that need no evaluation, and what they read."""
