"""Certificates that tests serve."""

from pathlib import Path

import trustme


def made(folder: Path) -> tuple[Path, Path, Path]:
    """Write a certificate for this machine, its key, and the certificate of who signed it, and return their paths."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    paths = folder / "certificate.pem", folder / "key.pem", folder / "authority.pem"
    issued.cert_chain_pems[0].write_to_path(paths[0])
    issued.private_key_pem.write_to_path(paths[1])
    authority.cert_pem.write_to_path(paths[2])
    return paths
