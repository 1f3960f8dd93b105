"""Sign a folder of models, or verify it, offline: an OpenSSF model-signing bundle beside the folder.

    .venv-signing/bin/python3 -m scripts.publish.signature sign KEY.pem FOLDER... [--verdict FILE]
    .venv-signing/bin/python3 -m scripts.publish.signature verify KEY.pub FOLDER...

The bundle of FOLDER is FOLDER.sig, in the format of https://github.com/ossf/model-signing-spec: a list of every file
with its sha256, signed with an elliptic key (P-256, P-384, P-521).  KEY_PASSWORD in the environment opens a private
key.  With --verdict a folder is signed only if it is exactly what the verdict is about.
"""

import argparse
import base64
import binascii
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from scripts.publish.vouch import check_vouched
from scripts.steps.records import hash_file, lock_file

# Git's mark of an empty folder, no part of a model
IGNORED = (".gitkeep",)
NEW_KEY = (
    "openssl ecparam -name prime256v1 -genkey -noout -out key.pem && openssl ec -in key.pem -pubout -out key.pub; "
    "key.pem signs and stays secret, key.pub verifies"
)


def find_bundle(folder: str) -> str:
    """Return the path of a folder's bundle, which lies beside the folder."""
    return f"{folder.rstrip('/')}.sig"


def sign_folder(folder: str, key: str, verdict: str = "") -> str:
    """Write the bundle of a folder and return the digest that it signs; SystemExit if the folder cannot be signed."""
    from model_signing import signing  # type: ignore[import-not-found]

    if not Path(folder).is_dir():
        raise SystemExit(f"{folder}: no such folder; expected one with models")
    bundle = Path(find_bundle(folder))
    draft = bundle.with_name(f"{bundle.name}~")
    with lock_file("publish", fcntl.LOCK_SH):  # no other make publishes while the folder is read
        right = check_vouched(folder, verdict, "it is not signed") if verdict else {}
        password = os.environ.get("KEY_PASSWORD", "").encode() or None
        try:
            config = signing.Config().use_elliptic_key_signer(private_key=key, password=password)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise SystemExit(
                f"KEY={key}: no elliptic private key to sign with ({error}); a new one: {NEW_KEY}"
            ) from None
        try:
            config.set_hashing_config(choose_hashing()).sign(folder, draft)
        except ValueError as error:
            raise SystemExit(f"{folder}: not signed: {error}") from None
    digest, files = read_bundle(str(draft))
    if right and files != right:
        draft.unlink()
        raise SystemExit(
            f"{folder}: not signed: {list_differences(right, files)[0]}, which was not judged; make repository"
        )
    draft.replace(bundle)
    return digest


def verify_folder(folder: str, key: str, bundle: str = "") -> str:
    """Return the digest that was signed; SystemExit with each file that was altered, added or removed since."""
    from cryptography.exceptions import InvalidSignature
    from model_signing import verifying

    bundle = bundle or find_bundle(folder)
    for path, what in ((bundle, "the signature"), (key, "the public key"), (folder, "the folder")):
        if not Path(path).exists():
            raise SystemExit(f"{path}: no such file; expected {what}; make sign KEY=key.pem writes a signature")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except (ValueError, TypeError, AttributeError) as error:
        raise SystemExit(f"KEY={key}: no public key to verify with ({error}); a new pair: {NEW_KEY}") from None
    try:
        config.set_hashing_config(choose_hashing()).verify(Path(folder), bundle)
    except InvalidSignature:
        raise SystemExit(f"{bundle}: not signed by KEY={key}, or altered since") from None
    except Exception as error:  # the library raises many kinds of errors for a broken bundle
        if not str(error).startswith("Signature mismatch"):  # this text comes only if the signature itself was right
            raise SystemExit(f"{folder}: {bundle} cannot be verified with KEY={key}: {error}") from None
        wrong = list_differences(read_bundle(bundle)[1], list_files(folder)) or [str(error)]
        raise SystemExit(
            "\n".join([*(f"{folder}/{line}" for line in wrong), f"{folder} is not what was signed"])
        ) from None
    return read_bundle(bundle)[0]


def choose_hashing() -> Any:
    """Return how files are hashed: each whole, by sha256; only .gitkeep is left out, not the library's own list."""
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=IGNORED, ignore_git_paths=False)


def read_bundle(bundle: str) -> tuple[str, dict[str, str]]:
    """Return the digest of all and the sha256 of each file in a bundle; they prove nothing until it is verified."""
    try:
        payload = json.loads(Path(bundle).read_bytes())["dsseEnvelope"]["payload"]
        statement = json.loads(base64.b64decode(payload))
        files = {one["name"]: one["digest"] for one in statement["predicate"]["resources"]}
        return str(statement["subject"][0]["digest"]["sha256"]), files
    except (ValueError, KeyError, TypeError, IndexError, binascii.Error):
        raise SystemExit(f"{bundle}: no model-signing bundle; make sign KEY=key.pem writes one") from None


def list_files(folder: str) -> dict[str, str]:
    """Return the sha256 of each file of a folder, by its path there."""
    paths = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
    return {name: hash_file(str(path)) for name, path in paths.items() if name not in IGNORED}


def list_differences(signed: dict[str, str], here: dict[str, str]) -> list[str]:
    """Return a line for each file that was altered, added or removed."""
    kinds = {path: "removed" if path not in here else "added" if path not in signed else "altered"
             for path in sorted(signed.keys() | here.keys()) if signed.get(path) != here.get(path)}  # fmt: skip
    return [f"{path}: {kind} since it was signed" for path, kind in kinds.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("sign", "verify"))
    parser.add_argument("key", metavar="KEY")
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--verdict", default="")
    parser.add_argument("--bundle", default="", help="bundle of a single folder, if it lies elsewhere")
    given = parser.parse_args()
    for folder in given.folders:
        if given.verb == "sign":
            print(f"{find_bundle(folder)}: {folder} signed, digest {sign_folder(folder, given.key, given.verdict)}")
        else:
            print(f"{folder} is what was signed, digest {verify_folder(folder, given.key, given.bundle)}")


if __name__ == "__main__":
    main()
