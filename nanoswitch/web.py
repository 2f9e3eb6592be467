"""A file of the web, by its address: fetched once, in pieces that survive a kill."""

import contextlib
import hashlib
import os
import re
from urllib.parse import unquote, urlsplit

from nanoswitch.files import sync
from nanoswitch.hub import OFFLINE, with_retries
from nanoswitch.readers import READABLE, ending


def is_address(source):
    return source.lower().startswith(("http://", "https://"))


def file_name(address):
    """The name of the file behind an address; ValueError when it is none that can be read."""
    name = re.sub(r"[^\w.-]+", "_", unquote(urlsplit(address).path).rstrip("/").split("/")[-1])
    if not ending(name) or name == ending(name):
        raise ValueError(
            f"{address} does not end as a file that can be read: {READABLE}; a dataset of the hub "
            "goes by OWNER/NAME"
        )
    return name


def own_folder(address, folder):
    return os.path.join(folder, hashlib.sha256(address.encode()).hexdigest()[:16])


def fetch(address, folder):
    """Download a file once -> its path in `folder`, which no other address shares. What is there of
    a download that was cut short is kept, if the server says that it is still the same file.
    ValueError when it cannot be had, or is not as long as the server said."""
    path = os.path.join(own_folder(address, folder), file_name(address))
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        page = with_retries(address, lambda: download(address, path + ".part"), OFFLINE)
        if page:
            raise ValueError(f"cannot fetch {address}: the server sends a web page, not the file")
        os.replace(path + ".part", path)
    return path


def download(address, path):
    """One try; what it got stays for the next. True when a web page comes instead of a file."""
    import requests

    # identity: the length is then that of the file, and a .gz comes as it lies there
    headers, mark = {"Accept-Encoding": "identity"}, path + ".etag"
    begun = os.path.getsize(path) if os.path.exists(path) and os.path.exists(mark) else 0
    if begun:
        with open(mark, encoding="latin1") as file:
            headers |= {"Range": f"bytes={begun}-", "If-Range": file.read()}
    with requests.get(address, headers=headers, stream=True, timeout=60) as response:
        span = response.headers.get("Content-Range", "")
        if response.status_code == 416 and span == f"bytes */{begun}":
            return False  # all of it came before
        wrong = response.status_code == 206 and not span.startswith(f"bytes {begun}-")
        if wrong or (response.status_code == 416 and begun):
            os.remove(mark)  # so that the next try begins anew
            raise ConnectionError("the server does not go on from where it stopped")
        response.raise_for_status()
        if response.headers.get("Content-Type", "").startswith("text/html"):
            return True
        begun = begun if response.status_code == 206 else 0
        length = response.headers.get("Content-Length", "")
        with open(path, "ab" if begun else "wb") as file:
            if not begun:  # what to ask by for the rest
                etag = response.headers.get("ETag", "W/")
                etag = response.headers.get("Last-Modified", "") if etag[:2] == "W/" else etag
                write_mark(mark, etag)
            for block in response.raw.stream(1 << 20, decode_content=False):
                file.write(block)
    have, whole = os.path.getsize(path), begun + int(length or 0)
    if length and have != whole:
        raise ConnectionError(f"{have:,} of {whole:,} bytes came")
    sync(path)
    return False


def write_mark(path, etag):
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    if etag:
        with open(path, "w", encoding="latin1") as file:
            file.write(etag)
