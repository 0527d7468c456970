"""Runs: the train nodes, the registry, results, previews and the HTTP routes."""
