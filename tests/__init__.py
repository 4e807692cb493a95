"""Unit tests, integration tests, the testbed they share, and the demo."""
