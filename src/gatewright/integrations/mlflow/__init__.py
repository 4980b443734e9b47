"""MLflow: its stores and servers, and the tracker that logs to them."""
