"""Ray Serve's side of routing by prefix (routing.py): one router in each process that calls the replicas; here that is the front alone.

Calls carry the digests of their text as `keys`. Requests in flight are counted here, when they are routed and when they have ended, so no replica
has to be asked how busy it is. A replica that is full is passed over for the next in order; Ray Serve waits when all are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, ReplicaResult, RequestRouter, RunningReplica

from lilliput.serve.routing import SLACK, Affinity


class PrefixRouter(RequestRouter):
    """Sends a request to the replica that has read the longest beginning of it."""

    def initialize_state(self, **settings: Any) -> None:
        """Called once by Ray Serve. `slack`: see Affinity."""
        self._affinity = Affinity(settings.get("slack", SLACK))
        self._flying: Counter[str] = Counter()

    async def choose_replicas(self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None) -> list[list[RunningReplica]]:
        """Every candidate, whom to ask first first."""
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_name[name]] for name in self._affinity.order(_keys(pending_request), {name: self._flying[name] for name in by_name})]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult) -> None:
        """A replica has taken a request."""
        self._flying[replica_id.unique_id] += 1
        self._affinity.sent(replica_id.unique_id, _keys(pending_request))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """It has ended, however."""
        self._flying[replica_id.unique_id] -= 1

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """These are there; a new one has read nothing."""
        super().update_replicas(replicas)
        names = [replica.replica_id.unique_id for replica in replicas]
        self._affinity.keep(names)
        self._flying = Counter({name: count for name, count in self._flying.items() if name in names})


def _keys(request: PendingRequest | None) -> Sequence[bytes]:
    return () if request is None else request.kwargs.get("keys", ())
