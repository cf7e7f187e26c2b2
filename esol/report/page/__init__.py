"""report.html: a run to look at, without a server."""
