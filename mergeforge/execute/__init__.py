"""Run a plan: executors, journal, workspace, receipt, model card and streaming upload."""
