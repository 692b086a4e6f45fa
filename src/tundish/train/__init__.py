"""What runs on every rank. Nothing imports this package: the launcher starts it by name, LLM Foundry by entry point."""
