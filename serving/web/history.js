// Pictures that were drawn, kept in this browser: an entry is one picture, or two that were compared.

export const KEPT = 60; // entries; the oldest go
const STORE = "entries";

const settled = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

let opened;

function database() {
  if (!opened) {
    const request = indexedDB.open("diffray", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
    opened = settled(request);
  }
  return opened;
}

async function store(mode) {
  return (await database()).transaction(STORE, mode).objectStore(STORE);
}

/** All entries, the oldest first. */
export const entries = async () => settled((await store("readonly")).getAll());

/** Keep an entry, or what changed in it; it has an `id` then. */
export async function keep(entry) {
  entry.id = await settled((await store("readwrite")).put(entry));
  const keys = await settled((await store("readonly")).getAllKeys());
  const surplus = keys.slice(0, Math.max(0, keys.length - KEPT));
  for (const key of surplus) await forget(key);
  return surplus;
}

export const forget = async (id) => settled((await store("readwrite")).delete(id));

export const forgetAll = async () => settled((await store("readwrite")).clear());
