// Package dir is an object.Store on a directory: each object is one file whose
// path below the root is the object's name.
//
// A Put writes a temporary file beside the objects, syncs it, gives it its final
// name with link(2), which never replaces a file, and syncs the folder. So after
// a crash at any point a name has either all of its bytes or none, and of any
// number of writers, in any number of processes, exactly one gets the name. The
// bytes are durable when Put returns, and so are the folders above them.
//
// Folders are never removed: another process may be about to put a file into
// them, and would have to sync them again. Listings leave empty ones out.
//
// Files and folders whose names are no object names (lost+found, for one) are
// not touched and not listed. A name cannot be both an object and a folder.
//
// A local file system answers in its own time: a context ends a call between
// steps and between pieces of large files, not in the middle of a system call.
package dir
