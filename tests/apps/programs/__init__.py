"""Programs that run in pods: servers, clients, proxies."""
