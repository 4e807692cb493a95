"""The DaemonSet's image, built and tried without a container engine."""
