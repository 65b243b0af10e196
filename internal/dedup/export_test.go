package dedup

import "drc/internal/crypt"

// AwaitFilter waits until the filter has been filled.
func (x *Index) AwaitFilter() { <-x.loaded }

// IsNew is what the filter says.
func (x *Index) IsNew(id crypt.ChunkID) bool { return x.known.isNew(id) }
