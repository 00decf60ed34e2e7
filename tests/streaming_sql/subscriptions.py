"""RisingWave's two statements of a subscription cursor on a PostgreSQL: functions that do as they say, and a proxy that writes
calls of them in their place. Everything else of the protocol passes through."""

import contextlib
import re
import socket
import struct
import threading

import psycopg

CURSORS = """
create table changes_of_tick (
    n bigint generated always as identity, closed_tick timestamptz, op varchar,
    rw_timestamp bigint default floor(extract(epoch from clock_timestamp()) * 1000)
);
create function note_change() returns trigger language plpgsql as $$
declare
    part varchar := case when tg_op = 'UPDATE' then 'Update' else '' end;
begin
    if tg_op <> 'INSERT' then insert into changes_of_tick (closed_tick, op) values (old.closed_tick, part || 'Delete'); end if;
    if tg_op <> 'DELETE' then insert into changes_of_tick (closed_tick, op) values (new.closed_tick, part || 'Insert'); end if;
    return null;
end $$;
create function declare_cursor(subscription varchar, since bigint) returns void language plpgsql as $$ begin
    if subscription <> 'closed_tick_changes' then raise 'subscription not found: %', subscription; end if;
    if since < (select min(rw_timestamp) from changes_of_tick) then raise 'data may have been recycled'; end if;
    create temp table cursor_at as
    select coalesce(max(n), 0) as n, since is null as is_full from changes_of_tick where since is null or rw_timestamp < since;
end $$;
create function fetch_changes(at_most int, waits interval)
returns table (closed_tick timestamptz, op varchar, rw_timestamp bigint) language plpgsql as $$
declare
    until timestamptz := clock_timestamp() + waits;
    taken bigint[];
begin
    if (select is_full from cursor_at) then
        update cursor_at set is_full = false;
        return query select tick.closed_tick, 'Insert'::varchar, null::bigint from closed_tick as tick;
        return;
    end if;
    loop
        select array_agg(n) into taken from (
            select c.n from changes_of_tick as c where c.n > (select n from cursor_at) order by c.n limit at_most
        ) as next;
        exit when taken is not null or clock_timestamp() > until;
        perform pg_sleep(0.01);
    end loop;
    update cursor_at set n = greatest(n, (select max(t) from unnest(taken) as t));
    return query
    select c.closed_tick, c.op, c.rw_timestamp from changes_of_tick as c where c.n = any(taken) order by c.n;
end $$
"""
WATCHED = "create trigger noted after insert or update or delete on closed_tick for each row execute function note_change()"
_DECLARE = re.compile(r'declare changes subscription cursor for "(\w+)" (?:full|since (\d+))')
_FETCH = re.compile(r"fetch (\d+) from changes with \(timeout = ('\d+s')\)")


class Proxy:
    """Listens on 127.0.0.1 for a PostgreSQL on a Unix socket."""

    def __init__(self, dsn: str):
        told = psycopg.conninfo.conninfo_to_dict(dsn)
        self._to = f"{told['host']}/.s.PGSQL.5432"
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.dsn = f"host=127.0.0.1 port={port} user={told['user']} dbname={told['dbname']} sslmode=disable gssencmode=disable"
        self.declared: list[str] = []
        self.is_away = False
        """Whether whoever connects is sent away."""
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Ends every connection without a word."""
        while self._open:
            with contextlib.suppress(OSError):
                self._open.pop().shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.is_away:
                    client.close()
                    continue
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._to)
                self._open += [client, server]
                for pump in ((self._statements, client, server), (self._answers, server, client)):
                    threading.Thread(target=pump[0], args=pump[1:], daemon=True).start()

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, server:
            while piece := server.recv(65536):
                client.sendall(piece)

    def _statements(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError, struct.error), client.makefile("rb") as sent, server:
            kind = b""  # the first message has none
            while True:
                (size,) = struct.unpack("!I", sent.read(4))
                body = sent.read(size - 4)
                if kind == b"Q":
                    body = self._rewritten(body[:-1].decode()).encode() + b"\0"
                server.sendall(kind + struct.pack("!I", len(body) + 4) + body)
                kind = sent.read(1)

    def _rewritten(self, statement: str) -> str:
        if declare := _DECLARE.fullmatch(statement):
            self.declared.append(statement)
            return f"select declare_cursor('{declare[1]}', {declare[2] or 'null'})"
        return _FETCH.sub(r"select * from fetch_changes(\1, \2)", statement)
