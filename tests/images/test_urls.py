"""Images by URL: what may be fetched from where, within which time, and that nothing else is touched."""

import asyncio
import socket
import threading
import time

import pytest

from labkit.images import ImageError, ImagesBusy, ImageUrls, Limits
from labkit.images import fetch as fetching
from labkit.images.decode import decode
from labkit.images.fetch import Answer, Target, addresses_of, fetch, hosts_of, is_public, target_of
from labkit.images.threads import Threads
from tests.images.pictures import data_url, file_of, picture

PNG = file_of(picture())


def read(urls, url):
    return asyncio.run(urls.read(url))


def never(*given):
    raise AssertionError(f"this must not be called: {given}")


# -- what is read ----------------------------------------------------------------------------------------------------


def test_a_data_url_is_read_without_permission_and_in_a_thread_of_its_own():
    seen = []

    def noting(data, limits):
        seen.append(threading.current_thread())
        return decode(data, limits)

    urls = ImageUrls(fetch=never, decode=noting)
    assert read(urls, data_url(PNG)).size == (7, 5)
    assert seen[0] is not threading.main_thread() and seen[0].daemon


@pytest.mark.parametrize("url", ["picture.png", "/etc/passwd", "aGVsbG8=", "", "//host/x"])
def test_what_is_no_url_is_not_taken_for_a_path(url):
    with pytest.raises(ImageError, match="an image is given by its URL"):
        read(ImageUrls(local_path="/", fetch=never), url)


@pytest.mark.parametrize("url", ["ftp://a/b.png", "blob:x", "gopher://a", "javascript:alert(1)", "filesystem:/x"])
def test_other_schemes_are_refused(url):
    with pytest.raises(ImageError, match=f"data:, http:, https: or file:, got {url.partition(':')[0]}:"):
        read(ImageUrls(local_path="/", fetch=never), url)


def test_files_are_read_below_the_allowed_folder_only(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    (root / "a b").mkdir(parents=True)
    other.mkdir()
    (root / "a b" / "x.png").write_bytes(PNG)
    (other / "x.png").write_bytes(PNG)
    (root / "link.png").symlink_to(other / "x.png")
    (tmp_path / "rootless.png").write_bytes(PNG)
    urls = ImageUrls(local_path=root, fetch=never)
    for good in (
        f"file://{root}/a%20b/x.png",
        f"FILE://localhost{root}/a%20b/x.png",
        f"file:{root}/a%20b/../a b/x.png",
    ):
        assert read(urls, good).size == (7, 5)
    outside = (
        f"file://{other}/x.png", f"file://{root}/../other/x.png", f"file://{root}/%2e%2e/other/x.png",
        f"file://{root}/link.png", f"file://{tmp_path}/rootless.png", f"file://{root}", "file://host/x.png",
        "file:///etc/passwd", "file:relative.png", "file:",
    )  # fmt: skip
    for bad in outside:
        with pytest.raises(ImageError, match="does not lie below") as failure:
            read(urls, bad)
        assert str(tmp_path) not in str(failure.value)
    with pytest.raises(ImageError, match="not valid"):
        read(urls, f"file://{root}/a%00b")
    with pytest.raises(ImageError, match=r"'missing\.png' cannot be opened: No such file"):
        read(urls, f"file://{root}/missing.png")
    with pytest.raises(ImageError, match="--allowed-local-media-path"):
        read(ImageUrls(fetch=never), f"file://{root}/a%20b/x.png")
    with pytest.raises(ValueError, match="allowed_local_media_path must be a folder"):
        ImageUrls(local_path=tmp_path / "rootless.png")


def test_a_caller_may_read_in_its_own_thread_what_is_allowed(tmp_path):
    (tmp_path / "x.png").write_bytes(PNG)
    urls = ImageUrls(local_path=tmp_path, domains="a.b", fetch=lambda target, limits: Answer(PNG, "image/png"))
    for url in (data_url(PNG), f"file://{tmp_path}/x.png", "https://a.b/x.png"):
        assert urls.read_now(url).size == (7, 5)
    for url in ("https://b.a/x.png", f"file://{tmp_path.parent}/x.png", "ftp://a.b/x", "x.png"):
        with pytest.raises(ImageError):
            urls.read_now(url)
    assert urls.decoding.num_busy == 0 and ImageUrls(local_path="").root is None


HOSTS = hosts_of(["Images.Example.com", "cdn.example.com:8443", "[2606:4700::1111]"])


def test_only_listed_hosts_are_asked_at_the_usual_or_the_listed_port():
    assert target_of("https://images.example.com/a%20b?c=d#e", HOSTS) == (
        "https",
        "images.example.com",
        443,
        "/a%20b?c=d",
    )
    assert target_of("HTTP://IMAGES.example.com.", HOSTS) == ("http", "images.example.com", 80, "/")
    assert target_of("https://cdn.example.com:8443/", HOSTS).port == 8443
    assert target_of("http://[2606:4700::1111]/", HOSTS).host == "2606:4700::1111"
    for url in (
        "https://example.com/", "https://sub.images.example.com/", "https://images.example.com.evil.org/",
        "https://images.example.com:8443/", "http://images.example.com:22/", "https://cdn.example.com/",
        "http://127.0.0.1/", "http://2130706433/", "http://[::1]/", "http://localhost/",
    ):  # fmt: skip
        with pytest.raises(ImageError, match="are not fetched: the server may allow it with --allowed-media-domains"):
            target_of(url, HOSTS)
    with pytest.raises(ImageError, match=r"images from images\.example\.com are not fetched"):
        read(ImageUrls(fetch=never), "https://images.example.com/x.png")


@pytest.mark.parametrize(
    "url",
    [
        "http://images.example.com@evil.org/", "http://user:key@images.example.com/", "http://evil.org\\@images.example.com/",
        "http://images.example.com\r\nX: y/", "http://images.example.com/a b", "http://images.\u0435xample.com/",
        "http:///x", "http://[::1", "http://images.example.com:99999/", "http://[fe80::1%25eth0]/",
        "http://images.example.com/" + "a" * 9000,
    ],
)  # fmt: skip
def test_a_url_that_readers_may_understand_differently_is_refused(url):
    with pytest.raises(ImageError):
        target_of(url, HOSTS)


@pytest.mark.parametrize("name", ["", "https://a.b", "a.b/c", "*.a.b", "u@a.b", "a.b:x", "*", "\u00e4.b"])
def test_a_host_that_cannot_be_on_the_list_is_named(name):
    with pytest.raises(ValueError, match="allowed_media_domains takes names of hosts"):
        hosts_of([name])


PRIVATE = [
    "127.0.0.1",
    "127.8.8.8",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "100.100.100.200",
    "0.0.0.0",
    "0.1.2.3",
    "192.0.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "fe80::1",
    "fec0::1",
    "fc00::1",
    "fd00:ec2::254",
    "ff02::1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::127.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::808:808",
    "64:ff9b:1::1",
    "2002:7f00:1::",
    "2001:0:1::1",
    "2001:db8::1",
    "100::1",
]


def test_addresses_within_networks_are_not_public():
    assert [address for address in PRIVATE if is_public(address)] == []
    assert all(map(is_public, ("8.8.8.8", "93.184.215.14", "::ffff:8.8.8.8", "2606:4700::1111")))


# -- over HTTP, with a server here that answers what a test says ------------------------------------------------------


class Site:
    """Listens on loopback. Each connection is answered by `answers`, bytes one after the other with pauses between."""

    def __init__(self, *answers, pause=0.0):
        self.answers, self.pause, self.asked = answers, pause, []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while not self.done.is_set():
            try:
                line, _ = self.socket.accept()
            except OSError:
                return
            with line:
                self.asked.append(line.recv(65536))
                try:
                    for answer in self.answers:
                        line.sendall(answer)
                        if self.done.wait(self.pause):
                            return
                except OSError:
                    pass  # the reader has left

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.done.set()
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join(5)


def ok(data=PNG, *headers, kind="image/png", length=True):
    lines = [
        "HTTP/1.1 200 OK",
        f"Content-Type: {kind}",
        *headers,
        *([f"Content-Length: {len(data)}"] if length else []),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def loopback(address):
    return address == "127.0.0.1"


def got(site, limits=None, path="/x.png", host="site.test", scheme="http"):
    target = Target(scheme, host, site.port, path)
    return fetch(target, limits or Limits(seconds=5), resolve=lambda *_: ["127.0.0.1"], is_allowed=loopback)


def test_a_file_arrives_with_its_declared_type_and_the_site_sees_one_plain_question():
    with Site(ok(kind="Image/PNG; x=y")) as site:
        assert got(site, path="/a?b=c") == Answer(PNG, "image/png")
        question = site.asked[0].decode()
        assert question.startswith(f"GET /a?b=c HTTP/1.1\r\nHost: site.test:{site.port}\r\n")
        assert "labkit/" in question and "Cookie" not in question and "Authorization" not in question


def test_a_chunked_file_and_one_without_a_length_arrive():
    pieces = [b"%x\r\n%s\r\n" % (len(part), part) for part in (PNG[:50], PNG[50:])]
    with Site(ok(b"", "Transfer-Encoding: chunked", length=False), *pieces, b"0\r\n\r\n") as site:
        assert got(site).data == PNG
    with Site(ok(length=False)) as site:
        assert got(site).data == PNG


ANSWERS = {
    "a redirect, which is not followed": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n",
    "answered with status 404": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    "answered with status 206": b"HTTP/1.1 206 Partial\r\nContent-Length: 0\r\n\r\n",
    "did not answer in HTTP": b"hello\r\n\r\n",
    "a compressed answer": ok(PNG, "Content-Encoding: gzip"),
    r"sent 3 of 300 bytes": b"HTTP/1.1 200 OK\r\nContent-Length: 300\r\n\r\nabc",
    r"has 999,999,999 bytes; at most 2,000": b"HTTP/1.1 200 OK\r\nContent-Length: 999999999\r\n\r\nabc",
    r"has 2,001 bytes; at most 2,000": ok(bytes(10_000), length=False),
    "not answer in HTTP": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
}


@pytest.mark.parametrize("words", ANSWERS)
def test_an_answer_that_is_no_whole_file_is_an_error_that_says_why(words):
    with Site(ANSWERS[words]) as site, pytest.raises(ImageError, match=words):
        got(site, Limits(max_bytes=2000, seconds=5))


def test_an_endless_answer_ends_at_the_bound_of_bytes():
    with (
        Site(ok(b"", length=False), *[bytes(2**16)] * 1000) as site,
        pytest.raises(ImageError, match="at most 100,000"),
    ):
        got(site, Limits(max_bytes=100_000, seconds=5))


@pytest.mark.parametrize(
    "answers",
    [[b""] * 99, [b"H"] * 99, [b"HTTP/1.1 200 OK\r\n"] + [b"X: y\r\n"] * 99, [ok(b"", length=False)] + [b"x"] * 99],
)
def test_a_slow_site_ends_at_the_bound_of_time_wherever_it_is_slow(answers):
    begin = time.monotonic()
    with Site(*answers, pause=0.02) as site, pytest.raises(ImageError, match=r"did not arrive within 0\.15 s"):
        got(site, Limits(seconds=0.15))
    assert time.monotonic() - begin < 1.5


def test_a_site_without_a_trusted_certificate_is_not_read():
    with (
        Site(b"this is not TLS\r\n\r\n") as site,
        pytest.raises(ImageError, match=r"no trusted connection to site\.test"),
    ):
        got(site, scheme="https")


def test_a_host_that_does_not_exist_or_does_not_listen_is_an_error():
    with Site() as site:
        pass
    with pytest.raises(ImageError, match=r"site\.test cannot be reached"):
        got(site)
    with pytest.raises(ImageError, match="cannot be resolved"):
        fetch(Target("http", "nowhere.invalid", 80, "/"), Limits(), resolve=lambda *_: [])


def test_a_name_that_resolves_into_a_network_is_refused_and_nothing_is_connected(monkeypatch):
    monkeypatch.setattr(fetching.socket, "create_connection", never)
    for found in (["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::ffff:169.254.169.254"], ["fe80::1%eth0"]):
        with pytest.raises(ImageError, match=r"images\.example\.com is not on the public internet") as failure:
            fetch(Target("http", "images.example.com", 80, "/"), Limits(), resolve=lambda *_, found=found: found)
        assert found[0] not in str(failure.value)
    assert "127.0.0.1" in addresses_of("127.0.0.1", 80)
    with pytest.raises(ImageError, match="not on the public internet"):
        fetch(Target("http", "127.1", 80, "/"), Limits())  # another way to write 127.0.0.1


def test_the_name_is_resolved_once_and_the_checked_address_is_connected():
    """A name server that answers differently the second time (DNS rebinding) changes nothing."""
    asked = []

    def resolve(host, port):
        asked.append((host, port))
        return ["127.0.0.1"] if len(asked) == 1 else ["10.0.0.1"]

    with Site(ok()) as site:
        target = Target("http", "rebinding.test", site.port, "/")
        assert fetch(target, Limits(seconds=5), resolve=resolve, is_allowed=loopback).data == PNG
    assert asked == [("rebinding.test", site.port)]


def test_what_was_fetched_must_be_what_it_is_declared_to_be():
    def answering(kind):
        return ImageUrls(domains=["a.b"], fetch=lambda target, limits: Answer(PNG, kind))

    for kind in ("image/png", "", "application/octet-stream"):
        assert read(answering(kind), "https://a.b/x").format == "PNG"
    with pytest.raises(ImageError, match="declared as image/gif, and it is image/png"):
        read(answering("image/gif"), "https://a.b/x")
    with pytest.raises(ImageError, match="its type is 'text/html'"):
        read(answering("text/html"), "https://a.b/x")


# -- time ------------------------------------------------------------------------------------------------------------


def test_an_image_that_takes_too_long_is_an_error_of_its_request_and_others_go_on():
    release = threading.Event()

    def decoding(data, limits):
        if data == b"slow":
            release.wait(20)
        return decode(data, limits)

    urls = ImageUrls(limits=Limits(seconds=0.1), decode=decoding)

    async def main():
        with pytest.raises(ImageError, match=r"could not be decoded within 0\.1 s"):
            await urls.read(data_url(b"slow"))
        assert (await urls.read(data_url(PNG))).size == (7, 5)
        slow = [asyncio.create_task(urls.read(data_url(b"slow"))) for _ in range(6)]  # more than there are places
        failures = await asyncio.gather(*slow, return_exceptions=True)
        assert [type(one) for one in failures].count(ImagesBusy) == 3
        assert all(isinstance(one, ImageError) for one in failures)
        with pytest.raises(ImagesBusy, match="try again later"):
            await urls.read(data_url(PNG))
        assert urls.decoding.num_busy == 4 and not urls.decoding.waiting
        release.set()
        while urls.decoding.num_busy:
            await asyncio.sleep(0.005)
        assert (await urls.read(data_url(PNG))).size == (7, 5)

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_fetch_that_does_not_end_is_an_error():
    release = threading.Event()
    urls = ImageUrls(limits=Limits(seconds=0.05), domains=["a.b"], fetch=lambda *_: release.wait(20))
    urls.fetching.num = 1

    async def main():
        with pytest.raises(ImageError, match="did not arrive"):
            await urls.fetching.run(lambda: release.wait(20), 0.05, "the image did not arrive")
        with pytest.raises(ImagesBusy):
            await urls.fetching.run(never, 0.05, "late")
        release.set()

    asyncio.run(main())


def test_threads_return_what_is_returned_raise_what_is_raised_and_end():
    threads = Threads(2, "test")

    async def main():
        assert sorted(await asyncio.gather(*(threads.run(lambda i=i: i, 5, "late") for i in range(50)))) == [*range(50)]
        with pytest.raises(KeyError):
            await threads.run(lambda: {}["x"], 5, "late")
        left = asyncio.create_task(threads.run(lambda: 1, 5, "late"))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)

    asyncio.run(main())
    until = time.monotonic() + 5
    while threads.num_busy and time.monotonic() < until:
        time.sleep(0.001)
    assert threads.num_busy == 0 and not threads.waiting
