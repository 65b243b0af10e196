// Package crypt holds DRC's keys and what is done with them: who may sign
// history, who may read it, and how bytes are sealed. It follows the section
// "Keys" of docs/FORMAT.md and does no I/O besides decoding key files.
//
// The hierarchy, from the top:
//
//   - The root key (ed25519) is made by init. The repository's id is a hash of
//     its public half. Root signs repository records and agent certificates,
//     so whoever has only the stores can forge nothing.
//   - An agent key (ed25519, with an age recipient of its own) signs key sets,
//     log objects and manifests. It cannot read content.
//   - A key set is made at every start of an agent. Its content key is sealed
//     to the repository's recipients; its index key also to the agent.
//   - Each segment, manifest and log value has its own AES-256-GCM keys,
//     derived by HKDF from a key of a key set and the random id of the thing.
package crypt
