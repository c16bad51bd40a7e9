"""Who is answered: this machine by its name, or whoever has the token; never another page's request."""

from __future__ import annotations

import re

import numpy as np
import pytest

from moescope.app import build, server
from moescope.app.server import listen
from moescope.errors import MoescopeError, StoreError
from tests.analysis.made_stores import random_truth, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("guarded")
    write(path / "one", random_truth(np.random.default_rng(0), 6, [4, 4], [2, 2]), [4, 4], {"domain": list("aabbab")})
    return path


@pytest.fixture(scope="module")
def local(folder):
    return build(folder).server.test_client()


@pytest.fixture
def guarded(folder):
    return build(folder, token="a secret").server.test_client()


@pytest.mark.parametrize("host", ["127.0.0.1:8050", "localhost:8050", "127.0.0.1", "[::1]:8050"])
def test_this_machine_is_answered(local, host):
    assert local.get("/", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8050", "127.0.0.1.evil.example", "192.168.1.4:8050"])
def test_another_name_for_this_machine_is_refused(local, host):
    assert local.get("/", headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("origin", ["https://evil.example", "http://[", "null", ""])
def test_another_pages_request_is_refused(local, origin):
    body = {"json": {}, "headers": {"Host": "127.0.0.1:8050", "Origin": origin}}
    assert local.post("/_dash-update-component", **body).status_code == 403


@pytest.mark.parametrize(
    ("site", "mode", "status"),
    [
        ("cross-site", "no-cors", 403),  # an image of another page
        ("cross-site", "cors", 403),
        ("cross-site", "navigate", 200),  # a link to the app, and a notebook's frame
        ("same-origin", "cors", 200),
        ("none", "navigate", 200),
    ],
)
def test_what_another_page_loads_is_refused_and_what_goes_here_is_answered(local, site, mode, status):
    headers = {"Host": "127.0.0.1:8050", "Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode}
    assert local.get("/", headers=headers).status_code == status


def test_a_page_may_load_nothing_from_elsewhere_and_run_no_script_of_its_text(local):
    answer = local.get("/", headers={"Host": "localhost"})
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'self'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in policy["script-src"]
    assert not re.search(r"(src|href)=\W?(https?:)?//", answer.get_data(as_text=True))


def test_with_a_token_nothing_is_answered_without_it(guarded):
    for path in ("/", "/_dash-layout", "/file/load.html", "/assets/app.js"):
        assert guarded.get(path).status_code == 401
    assert guarded.get("/?token=wrong").status_code == 401
    assert guarded.get("/?token=%C3%A9").status_code == 401


def test_the_token_is_asked_for_once(guarded):
    answer = guarded.get("/store/one?token=a+secret&layer=1", headers={"Host": "far.example:8050"})
    assert answer.status_code == 302
    assert answer.headers["Location"] == "/store/one?layer=1"
    assert "HttpOnly" in answer.headers["Set-Cookie"]
    assert "SameSite=Strict" in answer.headers["Set-Cookie"]
    assert guarded.get("/store/one?layer=1", headers={"Host": "far.example:8050"}).status_code == 200


def test_a_token_never_leads_to_another_site(guarded):
    answer = guarded.get("//evil.example/?token=a+secret")
    assert not answer.headers.get("Location", "/").startswith("//")


@pytest.mark.parametrize(
    "path",
    [
        "/file/load.html?at=/store/..%252F..%252Fetc",
        "/file/load.html?at=/store/%2Fetc",
        "/file/nothing.html?at=/store/one",
        "/file/load.exe?at=/store/one",
        "/file/..%2F..%2Fetc%2Fpasswd.html?at=/store/one",
    ],
)
def test_no_file_outside_is_sent(local, path):
    answer = local.get(path, headers={"Host": "localhost"})
    assert answer.status_code in (400, 404, 503) or "root:" not in answer.get_data(as_text=True)
    assert "root:" not in answer.get_data(as_text=True)


def test_no_folder_and_a_taken_port_are_sentences(folder):
    with pytest.raises(StoreError, match="is no folder"):
        build(folder / "nothing")
    app = build(folder)
    server = listen(app)
    try:
        with pytest.raises(MoescopeError, match="name another with --port"):
            listen(app, port=server.server_port)
    finally:
        server.server_close()


def test_an_empty_token_opens_no_door(folder, monkeypatch, capsys):
    assert build(folder, token="").server.test_client().get("/", headers={"Host": "far.example"}).status_code == 403
    monkeypatch.setattr("werkzeug.serving.BaseWSGIServer.serve_forever", lambda self: None)
    server.serve(folder, host="0.0.0.0", port=0, token="")
    assert re.search(r"\?token=\S{20,}", capsys.readouterr().out)


@pytest.mark.parametrize("host", ["far.example", "[2001:db8::7]"])
def test_two_apps_on_one_machine_do_not_log_each_other_out(folder, host):
    """A browser sends the cookies of a host to every port of it."""
    apps = {8050: build(folder, token="one").server, 8051: build(folder, token="two").server}
    jar: dict[str, str] = {}

    def visit(port, path):
        sent = {"Cookie": "; ".join(f"{name}={value}" for name, value in jar.items())}
        client = apps[port].test_client(use_cookies=False)
        answer = client.get(path, base_url=f"http://{host}:{port}", headers=sent)
        for line in answer.headers.getlist("Set-Cookie"):
            name, _, value = line.partition(";")[0].partition("=")
            jar[name] = value
        return answer.status_code

    assert [visit(8050, "/?token=one"), visit(8051, "/?token=two")] == [302, 302]
    assert [visit(8050, "/"), visit(8051, "/"), visit(8050, "/")] == [200, 200, 200]
    assert len(jar) == 2
