"""L3: the one engine: requests, scheduler, blocks, runners, cache policies."""
