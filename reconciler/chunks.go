package reconciler

import (
	"context"

	"github.com/troupe-dev/troupe/images"
)

// keepChunks makes again what is missing of the files that nodes fetch of an image, as after it came from a registry, which
// has the image alone. Without them nodes fetch the image whole: that is no reason to build it again.
func (a *artifacts) keepChunks(ctx context.Context, img images.Image) {
	if a == nil {
		return
	}
	made, err := a.chunks.Keep(ctx, a.blobs, img)
	if err != nil && ctx.Err() == nil {
		a.log.Warn("nodes fetch an image whole", "image", img.Digest.Short(), "error", err)
	}
	if made {
		a.log.Info("made the files for transfers of an image again", "image", img.Digest.Short())
	}
}
