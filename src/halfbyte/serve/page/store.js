// Conversations, in this browser only.

const NAME = "halfbyte";
const STORE = "chats";

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function run(mode, work) {
  let database;
  try {
    database = await open();
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction(STORE, mode);
      const request = work(transaction.objectStore(STORE));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onerror = () => reject(transaction.error);
    });
  } catch {
    return undefined; // a private window may have no storage: the page works without
  } finally {
    database?.close();
  }
}

export const save = (chat) => run("readwrite", (store) => store.put(chat));
export const remove = (id) => run("readwrite", (store) => store.delete(id));
export const all = async () => ((await run("readonly", (store) => store.getAll())) ?? []).sort((a, b) => b.changed - a.changed);
