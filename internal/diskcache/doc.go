// Package diskcache keeps values that can be had again in a directory on the
// local disk, up to a limit of bytes, over restarts. It is a mechanism and knows
// no stage: what comes in are byte strings of up to some MiB under a kind and a
// name of 32 bytes, what goes out are the same bytes or nothing.
//
// Nothing in it needs to be durable or right, and nobody gets an error for it:
//
//   - A value that is damaged, cannot be read or is not there is a miss. Each has a
//     checksum against accidents; who fears more than accidents verifies what Get
//     returns, as all users here do with an AEAD, and calls Drop if it is no good.
//   - Nothing is ever synced. After the death of the process all is there that was
//     written; after a power cut what the disk happens to have, checked when read.
//   - A disk that is full or fails stops the storing for a minute, and is tried
//     again then; it is said once. A full disk also gets the room of a slab back,
//     so that a limit larger than the disk does no harm. Reading goes on.
//   - Files in the directory that the cache has not made are left alone, also when
//     they have a name like its own. There is one process a directory.
//
// # Slabs
//
// Values are appended to files of 64 MiB (less if the limit is small: a sixteenth
// of it; more if it is above 64 GiB, so that there never are much more than a
// thousand files). When the limit is reached a whole file is removed: of the older
// half of the slabs the one of which the least is in use, that is, was used while the
// cache was written about once over. What is in use in it, the values used last first,
// is moved to the newest slab before: as much as makes up a quarter of a slab, and the
// rest goes. Why not otherwise:
//
//   - A file for each value makes 80,000 files for 10 GiB; to list and stat them at
//     start takes seconds, and file systems give small files whole blocks.
//   - One file with free space inside needs an allocator, its bookkeeping must
//     survive crashes, and it fragments. Whole files go in one cheap call and give
//     back what they had.
//   - Strict order of use would rewrite a place on each hit. Here a hit writes
//     nothing, and about one byte in four that is written is a moved one at most.
//   - Who reads a whole volume once pushes out what nobody has used twice, and not
//     what is in use: where that is close together its slab stays, and where it is
//     scattered it moves on. What is used is known since the start of the process
//     only; after a restart age alone counts until there are hits again.
//
// A slab that is complete ends with a table of what is in it, so Open reads one
// table a slab and no values: 10 GiB of values of 128 KiB are 160 tables of 8 KiB.
// The slab that was being written when the process died has none; its records are
// found one by one by their heads.
//
// # Bounds
//
// The sizes of all slabs, tables included, never exceed the limit; a value counts as
// 4 KiB at least. Beside it there are what the file system adds (a partly filled
// block a file), a lock file, and slabs that were removed while a value in them was
// being read, for as long as that takes.
//
// Memory is about 64 bytes for each value (IndexBytes is the upper bound): 10 GiB
// with 128 KiB values take 5 MiB. As small values count as 4 KiB it never is more
// than a fortieth of the limit. Values that wait to be written take up to
// Options.QueueBytes. There is one open file a slab.
//
// # On the disk
//
// drc-cache.lock is the lock. drc-cache-<number as 16 hexadecimal digits>.slab are
// the slabs; a higher number is a younger slab. Integers are little-endian,
// checksums CRC-32C.
//
//	slab:   magic "DRCCACHE" | version u32 = 1 | checksum of these u32
//	        records, without gaps
//	        table, if the slab is complete: rows, then its tail
//	record: magic u32 | kind u8 | 3 zeroes | value bytes u32 | checksum of the value u32
//	        name 32 bytes | checksum of the head so far u32 | value
//	row:    hash of kind and name u64 | offset of the record u32 | bytes of the record u32
//	tail:   magic u32 | number of rows u32 | checksum of the rows u32 | checksum of these u32
//
// A version that is not known is nobody's slab, and left alone.
package diskcache
