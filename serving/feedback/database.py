"""The SQL database of generations and ratings: its tables, and how to open it.

The default is SQLite in the storage folder, which any number of processes on one machine may share. Several
machines need PostgreSQL, given by its URL.
"""

import sqlite3
from typing import Any

from sqlalchemy import (
    JSON,
    CheckConstraint,
    Column,
    Connection,
    Double,
    Engine,
    ForeignKey,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    create_engine,
    event,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.schema import CreateIndex, CreateTable
from sqlalchemy.types import BigInteger

from cluster.sqlite import from_home, sqlite_url
from cluster.storage import STORES
from ray_jobs.config import Config, ConfigError
from ray_jobs.run.folder import SharedFolder

FILE = "feedback.db"  # in the storage folder
SCHEMA = 6  # increased, with a migration, whenever the tables change
BUSY_S = 30  # how long one SQLite writer waits for another, in seconds
LOCK = 0xD1FF_FEED  # PostgreSQL's advisory lock of whoever creates the tables
ID = String(28)

metadata = MetaData()

schema = Table(
    "feedback_schema",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("version", Integer, nullable=False),
)

generations = Table(
    "generations",
    metadata,
    Column("image_id", ID, primary_key=True),
    Column("created", Double, nullable=False, index=True),
    Column("model", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("adapter", Text),
    Column("adapters", JSON(none_as_null=True)),
    Column("prompt", Text, nullable=False),
    Column("negative_prompt", Text),  # NULL: none was given
    Column("seed", BigInteger, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("guidance_scale", Double, nullable=False),
    Column("size", Text, nullable=False),
    Column("strength", Double),
    Column("num_references", Integer),
    Column("control_scale", Double),
    Column("guidance_interval", JSON(none_as_null=True)),
    Column("user", Text),
    Column("key_id", Text),
    Column("seconds", Double, nullable=False),
    Column("role", Text, nullable=False),
)

# One rating per image and key; without keys all clients share the key "".
ratings = Table(
    "ratings",
    metadata,
    Column("image_id", ID, ForeignKey(generations.c.image_id), primary_key=True),
    Column("key_id", Text, primary_key=True),
    Column("rating", SmallInteger, CheckConstraint("rating IN (-1, 0, 1)"), nullable=False),
    Column("comment", Text),
    Column("created", Double, nullable=False),
)

# One vote per pair of images and key: `pair` is both ids in alphabetical order, so that a new vote replaces
# the former one, whichever image won.
votes = Table(
    "votes",
    metadata,
    Column("pair", String(57), primary_key=True),
    Column("key_id", Text, primary_key=True),
    Column("winner_id", ID, ForeignKey(generations.c.image_id), nullable=False),
    Column("loser_id", ID, ForeignKey(generations.c.image_id), nullable=False),
    Column("comment", Text),
    Column("created", Double, nullable=False),
)

# Random keys of what this endpoint signs, made by the first process that needs them.
secrets = Table(
    "secrets",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("value", LargeBinary, nullable=False),
)

# Requests that are answered later; see `job_store.JobRecord`.
jobs = Table(
    "jobs",
    metadata,
    Column("id", ID, primary_key=True),
    Column("created", Double, nullable=False),
    Column("key_id", Text, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("request", Text, nullable=False),
    Column("num_images", Integer, nullable=False),
    Column("has_mask", SmallInteger, nullable=False),
    Column("base_url", Text, nullable=False),
    Column("webhook_url", Text),
    Column("error", Text),
    Column("finished", Double),
    Column("notified", SmallInteger, nullable=False),
)

# By the version that they lead to; both databases support these statements.
MIGRATIONS = {
    # `negative_prompt` may be NULL. SQLite cannot drop a NOT NULL.
    2: (
        "ALTER TABLE generations ADD COLUMN negative_or_null TEXT",
        "UPDATE generations SET negative_or_null = NULLIF(negative_prompt, '')",
        "ALTER TABLE generations DROP COLUMN negative_prompt",
        "ALTER TABLE generations RENAME COLUMN negative_or_null TO negative_prompt",
    ),
    3: ("ALTER TABLE generations ADD COLUMN num_references INTEGER",),
    4: ("ALTER TABLE generations ADD COLUMN adapters JSON",),
    5: ("ALTER TABLE generations ADD COLUMN control_scale DOUBLE PRECISION",),
    6: ("ALTER TABLE generations ADD COLUMN guidance_interval JSON",),
}

UPSERT: dict[str, Any] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


def feedback_url(config: Config) -> str:
    """Return `serve.feedback_url`, by default the URL of a SQLite file in the storage folder.

    Raises:
        ConfigError: no URL is given, and the storage is remote, where a SQLite file cannot be stored.
    """
    if config.serve.feedback_url:
        return from_home(config.serve.feedback_url)
    if config.storage.startswith(STORES):
        raise ConfigError(
            f"serve.feedback_url: missing, and a SQLite database cannot lie in {config.storage}; give the "
            "URL of a PostgreSQL database, for example postgresql+psycopg://user:password@host/diffray"
        )
    storage = SharedFolder.of(config).root
    storage.filesystem.create_dir(storage.path)
    return sqlite_url(f"{storage.uri}/{FILE}")


def open_database(url: str) -> Engine:
    """Connect, and create or migrate the tables.

    Raises:
        ConfigError: the URL is not one of SQLite or PostgreSQL, its driver is not installed, nothing answers
            there, or a newer program created the tables; names serve.feedback_url.
    """
    try:
        engine = create_engine(url, pool_pre_ping=True)
    except ArgumentError:
        raise ConfigError(
            "serve.feedback_url: not the URL of a database; write it as "
            "postgresql+psycopg://user:password@host/database"
        ) from None
    except ImportError as error:
        raise ConfigError(f"serve.feedback_url: its driver is missing ({error}); pip install it") from None
    where = engine.url.render_as_string(hide_password=True)
    if engine.dialect.name not in UPSERT:
        raise ConfigError(f"serve.feedback_url: {where}: only SQLite and PostgreSQL are supported")
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
    try:
        _make_tables(engine, where)
    except DBAPIError as error:
        engine.dispose()
        reason = " ".join(str(error.orig).split())
        raise ConfigError(f"serve.feedback_url: {where}: {reason}; fix the database or the URL") from None
    except ConfigError:
        engine.dispose()
        raise
    return engine


def _prepare_sqlite(connection: "sqlite3.Connection", _: object) -> None:
    """Make commits durable when they return (FULL), and allow reading during writes (WAL)."""
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {1000 * BUSY_S}")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _make_tables(engine: Engine, where: str) -> None:
    """Create or migrate the tables; several processes may do so at once."""
    if inspect(engine).has_table(schema.name):
        with engine.connect() as connection:
            version = connection.scalar(select(schema.c.version)) or 0
        if version > SCHEMA:
            raise ConfigError(
                f"serve.feedback_url: {where}: its tables have version {version}, but this program "
                f"knows version {SCHEMA}; update diffray, or use another database"
            )
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            # Its IF NOT EXISTS fails while another process creates the same table. Held until the commit.
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        for table in metadata.sorted_tables:
            connection.execute(CreateTable(table, if_not_exists=True))
            for index in table.indexes:
                connection.execute(CreateIndex(index, if_not_exists=True))
        statement = UPSERT[engine.dialect.name](schema).values(id=1, version=SCHEMA)
        connection.execute(statement.on_conflict_do_nothing())
        _migrate(connection)


def _migrate(connection: Connection) -> None:
    """Migrate the tables of an older program; of several processes only the first does it."""
    for version, changes in MIGRATIONS.items():
        older = update(schema).where(schema.c.version == version - 1).values(version=version)
        if connection.execute(older).rowcount:  # other processes wait for this row, or see it changed
            for change in changes:
                connection.execute(text(change))
