// Package chunk brings a new version of an image to whoever has an old one, by content-defined chunks.
//
// An image is cut by FastCDC (Xia et al., FastCDC: a Fast and Efficient Content-Defined Chunking Approach for Data
// Deduplication, USENIX ATC 2016; its normalised chunking): where a chunk ends depends on the bytes before it and not on where they are,
// so that two images have the same chunks wherever they have the same bytes. Chunks are of 4 KiB on average. What is
// cut is not the image itself but its related form, in which the numbers in the metadata of a file system do not all change with
// one more file: see relate.go.
//
// Three files are made of an image, always the same of the same bytes. They are made once, and only read from then on:
//
//	index     which pages, and where; a few KB. See Index.Bytes
//	pack      each chunk as a zstd frame (RFC 8878), in the order of the image, and behind them the pages: lists of some 64
//	          chunks each with ID and sizes. So of the list of all chunks, too, only what is new is fetched
//	segments  the image in zstd frames of 1 MiB of it each: one zstd stream, for who has little or nothing of the image
//
// Whoever fetches takes a new chunk from the pack, or where it needs much of a segment, the segment. No byte of the three files
// is believed: sizes are bounded, pages and chunks are compared with their IDs, and of the whole image the caller checks the
// digest.
//
// Measured on pairs of Debian 12 images with a cloud kernel, of 284 MB, 73.5 MB under zstd -3. Of each, the KB on the wire, index
// and headers of ranges with them, and those of xdelta3 with its defaults, which has both images at hand:
//
//	                                              chunks   xdelta3
//	hello added                                      131        69
//	openssh-server and 13 more packages added      5,100     3,530
//	one library upgraded, libssl3                  2,280     1,230
//	all updates since a point release, kernel too 29,350    16,760
//	nothing there                                 78,030         -
//
// Chunks of 8 KiB on average, with zstd's default level and not the one above it, cost 174, 5,560, 2,380, 30,800 and 78,480. Without the
// related form the chunks of the first alone were some 590. A dictionary for the frames was not tried.
package chunk
