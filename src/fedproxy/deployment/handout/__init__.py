"""The hand-out of the proxy: content-addressed parts over HTTPS, verified, resumable, fetched once per proxy."""
