"""Clusters, their storage and jobs. A process that imports it has the variables of its job's user."""

from cluster.variables import take

take()
