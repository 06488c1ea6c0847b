"""Clusters, their storage and jobs. Importing this package sets the variables that the job's user sent."""

from cluster.variables import take

take()
