// Package dir is an object.Store on a directory: each object is one file whose
// path below the root is the object's name.
//
// A Put writes a temporary file beside the objects, syncs it, gives it its final
// name with link(2), which never replaces a file, and syncs the folder. So after
// a crash at any point a name has either all of its bytes or none, and of any
// number of writers, in any number of processes, exactly one gets the name. The
// bytes are durable when Put returns, and so are the folders above them.
//
// A Delete takes folders away that hold nothing any more; a writer that was about
// to use one makes it again and syncs it. Listings leave empty ones out.
//
// The root is known by its inode. When another directory, which was never used
// as a store, is in its place, the file system that was mounted there is gone:
// then there is no store, rather than an empty one.
//
// Files and folders whose names are no object names (lost+found, for one) are
// not touched and not listed. A name cannot be both an object and a folder.
//
// A local file system answers in its own time: a context ends a call between
// steps and between pieces of large files, not in the middle of a system call.
package dir
