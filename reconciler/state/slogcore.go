package state

import (
	"context"
	"log/slog"

	"go.uber.org/zap/zapcore"
)

// slogCore hands what etcd logs to slog, a level lower than etcd thinks of it: it warns of how it is embedded at every
// start, and calls it an error that its listener is closed at the end. What matters comes back as an error of a call.
type slogCore struct{ log *slog.Logger }

func (c slogCore) Enabled(l zapcore.Level) bool { return l >= zapcore.WarnLevel }

func (c slogCore) With(fields []zapcore.Field) zapcore.Core {
	return slogCore{slog.New(c.log.Handler().WithAttrs(attrs(fields)))}
}

func (c slogCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c slogCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	level := slog.LevelDebug
	if e.Level > zapcore.WarnLevel {
		level = slog.LevelWarn
	}
	c.log.LogAttrs(context.Background(), level, "etcd: "+e.Message, attrs(fields)...) //nolint:sloglint // it is etcd's
	return nil
}

func (c slogCore) Sync() error { return nil }

func attrs(fields []zapcore.Field) []slog.Attr {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range fields {
		f.AddTo(enc)
	}
	out := make([]slog.Attr, 0, len(enc.Fields))
	for k, v := range enc.Fields {
		out = append(out, slog.Any(k, v))
	}
	return out
}
