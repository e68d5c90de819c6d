"""Token ids in; classes, tags or tokens out."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from program import Program
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

VOCABULARY = 100


def _tokens(n=8, length=12, low=1):
    return torch.randint(low, VOCABULARY, (n, length))


def _padded(n=8, length=12):
    lengths = torch.randint(3, length + 1, (n,))
    lengths[0] = length
    tokens = _tokens(n, length)
    return tokens * (torch.arange(length) < lengths[:, None]), lengths


class Encoder(nn.Module):
    def __init__(self, width=32, heads=4, depth=2, length=16):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width, padding_idx=0)
        self.positions = nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.1)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.1, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, tokens):
        at = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.norm(self.tokens(tokens) + self.positions(at)))
        return self.layers(x, src_key_padding_mask=tokens == 0)


def bert_classifier() -> Program:
    """A padding mask, a pooled first token with tanh, dropout in front of the head."""

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.pooler = Encoder(), nn.Linear(32, 32)
            self.dropout, self.classifier = nn.Dropout(0.1), nn.Linear(32, 3)

        def forward(self, tokens):
            pooled = torch.tanh(self.pooler(self.encoder(tokens)[:, 0]))
            return self.classifier(self.dropout(pooled))

    model = Classifier()
    batch = _padded()[0], torch.randint(3, (8,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.AdamW(model.parameters(), lr=5e-5))


def masked_language_model() -> Program:
    """15 % of the tokens are masked and scored, all others have label -100; the decoder is tied."""

    class MLM(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = Encoder()
            self.transform = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.LayerNorm(32))
            self.decoder = nn.Linear(32, VOCABULARY)
            self.encoder.tokens.weight.data.normal_(std=0.02)
            self.decoder.weight = self.encoder.tokens.weight

        def forward(self, tokens):
            return self.decoder(self.transform(self.encoder(tokens)))

    tokens = _tokens()
    masked = torch.rand(tokens.shape) < 0.15
    masked[0, 0] = True
    labels = tokens.masked_fill(~masked, -100)
    model = MLM()
    return Program(
        model,
        lambda logits, y: F.cross_entropy(logits.view(-1, VOCABULARY), y.view(-1)),
        (tokens.masked_fill(masked, 99), labels),
        torch.optim.AdamW(model.parameters(), lr=1e-4),
    )


class CausalBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(c, dim=2)
        q, k, v = (z.view(n, t, self.heads, c // self.heads).transpose(1, 2) for z in (q, k, v))
        weights = (q @ k.transpose(-2, -1)) / math.sqrt(k.shape[-1])
        mask = torch.tril(torch.ones(t, t, dtype=torch.bool, device=x.device))
        weights = F.dropout(F.softmax(weights.masked_fill(~mask, float("-inf")), dim=-1), 0.1, self.training)
        x = x + self.c_proj((weights @ v).transpose(1, 2).reshape(n, t, c))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, width=32, heads=4, depth=2, length=16):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.drop = nn.Dropout(0.1)
        self.h = nn.ModuleList([CausalBlock(width, heads) for _ in range(depth)])
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        self.apply(self._start)
        self.wte.weight = self.lm_head.weight

    def _start(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens):
        x = self.drop(self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device)))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def gpt() -> Program:
    """Tied weights, shifted targets, biases and norms without weight decay."""
    model = GPT()
    tokens = _tokens(length=13)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=6e-4, betas=(0.9, 0.95)
    )
    return Program(
        model,
        lambda logits, y: F.cross_entropy(logits.view(-1, logits.size(-1)), y.reshape(-1), ignore_index=-1),
        (tokens[:, :-1], tokens[:, 1:]),
        optimizer,
    )


@dataclass
class CausalOutput:
    loss: torch.Tensor
    logits: torch.Tensor


class CausalModel(nn.Module):
    """Shifts the labels itself and returns its loss, as models of transformers do."""

    def __init__(self):
        super().__init__()
        self.transformer = GPT()

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.transformer(input_ids)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalOutput(loss, logits)


def causal_model_with_its_own_loss() -> Program:
    """A dict of arguments in, an object with .loss out."""
    tokens, lengths = _padded()
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    batch = {
        "input_ids": tokens,
        "attention_mask": mask.long(),
        "labels": tokens.masked_fill(~mask, -100),
    }
    model = CausalModel()
    return Program(model, None, batch, torch.optim.AdamW(model.parameters(), lr=5e-4))


class RMSNorm(nn.Module):
    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class LlamaBlock(nn.Module):
    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads, self.input_norm, self.post_norm = heads, RMSNorm(width), RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, 64, bias=False), nn.Linear(width, 64, bias=False)
        self.down = nn.Linear(64, width, bias=False)

    def rotate(self, x):
        t, d = x.shape[-2:]
        angle = torch.arange(t)[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
        a, b = x[..., ::2], x[..., 1::2]
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def forward(self, x):
        n, t, c = x.shape
        y = self.input_norm(x)
        q, k, v = (f(y).view(n, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(n, t, c))
        y = self.post_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def llama() -> Program:
    """Root mean square norms by hand, rotary positions, gated units, no biases."""

    class Llama(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCABULARY, 32)
            self.layers = nn.ModuleList(LlamaBlock() for _ in range(2))
            self.norm, self.head = RMSNorm(32), nn.Linear(32, VOCABULARY, bias=False)

        def forward(self, tokens):
            x = self.embed(tokens)
            for layer in self.layers:
                x = layer(x)
            return self.head(self.norm(x)).transpose(1, 2)

    tokens = _tokens(length=13)
    model = Llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    return Program(model, nn.CrossEntropyLoss(), (tokens[:, :-1], tokens[:, 1:]), optimizer)


def translation() -> Program:
    """nn.Transformer with causal and padding masks; the target's padding is not scored."""

    class Translator(nn.Module):
        def __init__(self, width=32):
            super().__init__()
            self.source, self.target = nn.Embedding(VOCABULARY, width), nn.Embedding(VOCABULARY, width)
            self.position = nn.Parameter(0.02 * torch.randn(16, width))
            self.transformer = nn.Transformer(width, 4, 2, 2, 64, 0.1, batch_first=True)
            self.generator = nn.Linear(width, VOCABULARY)

        def forward(self, source, target):
            t = target.shape[1]
            causal = torch.triu(torch.ones(t, t, dtype=torch.bool), 1)
            y = self.transformer(
                self.source(source) + self.position[: source.shape[1]],
                self.target(target) + self.position[:t],
                tgt_mask=causal,
                src_key_padding_mask=source == 0,
                tgt_key_padding_mask=target == 0,
                memory_key_padding_mask=source == 0,
            )
            return self.generator(y)

    source, target = _padded()[0], _padded()[0]
    loss = nn.CrossEntropyLoss(ignore_index=0, label_smoothing=0.1)
    model = Translator()
    return Program(
        model,
        lambda logits, y: loss(logits.reshape(-1, VOCABULARY), y.reshape(-1)),
        ((source, target[:, :-1]), target[:, 1:]),
        torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-9),
    )


def sequence_to_sequence() -> Program:
    """Packed source, teacher forcing, time first as nn.LSTM has it."""

    class Seq2Seq(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, 24, padding_idx=0)
            self.encoder, self.decoder = nn.LSTM(24, 32), nn.LSTM(24, 32)
            self.out = nn.Linear(32, VOCABULARY)

        def forward(self, source, lengths, target):
            packed = pack_padded_sequence(self.embedding(source.t()), lengths, enforce_sorted=False)
            _, state = self.encoder(packed)
            y, _ = self.decoder(self.embedding(target.t()), state)
            return self.out(y).permute(1, 2, 0)

    source, lengths = _padded()
    target, _ = _padded()
    model = Seq2Seq()
    return Program(
        model,
        nn.CrossEntropyLoss(ignore_index=0),
        ((source, lengths, target[:, :-1]), target[:, 1:]),
        torch.optim.Adam(model.parameters(), lr=1e-3),
    )


def lstm_sentiment() -> Program:
    """Bidirectional, packed, last states concatenated, one logit a text."""

    class Sentiment(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, 24, padding_idx=0)
            self.lstm = nn.LSTM(24, 16, num_layers=2, bidirectional=True, dropout=0.3, batch_first=True)
            self.fc, self.dropout = nn.Linear(32, 1), nn.Dropout(0.3)

        def forward(self, text, lengths):
            packed = pack_padded_sequence(
                self.dropout(self.embedding(text)), lengths, batch_first=True, enforce_sorted=False
            )
            _, (hidden, _) = self.lstm(packed)
            return self.fc(self.dropout(torch.cat([hidden[-2], hidden[-1]], 1))).squeeze(1)

    text, lengths = _padded(16)
    model = Sentiment()
    return Program(
        model,
        nn.BCEWithLogitsLoss(),
        ((text, lengths), torch.randint(2, (16,)).float()),
        torch.optim.Adam(model.parameters(), lr=1e-3),
    )


def tagger() -> Program:
    """A tag for each token, -100 at padding, by unpacking an LSTM."""

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, 24, padding_idx=0)
            self.lstm, self.out = nn.LSTM(24, 16, batch_first=True, bidirectional=True), nn.Linear(32, 9)

        def forward(self, text, lengths):
            packed = pack_padded_sequence(self.embedding(text), lengths, batch_first=True, enforce_sorted=False)
            y, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=text.shape[1])
            return self.out(y)

    text, lengths = _padded(16)
    tags = torch.randint(9, text.shape).masked_fill(text == 0, -100)
    model = Tagger()
    return Program(
        model,
        lambda logits, y: F.cross_entropy(logits.transpose(1, 2), y),
        ((text, lengths), tags),
        torch.optim.Adam(model.parameters(), lr=1e-3),
    )


def text_cnn() -> Program:
    """Filters of several widths and a maximum over time."""

    class TextCNN(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, 24)
            self.convs = nn.ModuleList([nn.Conv1d(24, 16, k) for k in (2, 3, 4)])
            self.dropout, self.fc = nn.Dropout(0.5), nn.Linear(48, 4)

        def forward(self, text):
            x = self.embedding(text).transpose(1, 2)
            x = torch.cat([F.relu(conv(x)).amax(2) for conv in self.convs], 1)
            return self.fc(self.dropout(x))

    model = TextCNN()
    batch = _tokens(16), torch.randint(4, (16,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.Adadelta(model.parameters()))


def bag_of_words() -> Program:
    """nn.EmbeddingBag with offsets, and SGD."""

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.EmbeddingBag(VOCABULARY, 32)
            self.fc = nn.Linear(32, 4)
            nn.init.uniform_(self.embedding.weight, -0.5, 0.5)
            nn.init.uniform_(self.fc.weight, -0.5, 0.5)
            nn.init.zeros_(self.fc.bias)

        def forward(self, text, offsets):
            return self.fc(self.embedding(text, offsets))

    model = Bag()
    batch = (torch.randint(VOCABULARY, (64,)), torch.arange(0, 64, 8)), torch.randint(4, (8,))
    return Program(model, nn.CrossEntropyLoss(), batch, torch.optim.SGD(model.parameters(), lr=0.5))


def word2vec() -> Program:
    """Skip-gram with negative samples; contexts start at zero, as in the original."""

    class SkipGram(nn.Module):
        def __init__(self):
            super().__init__()
            self.center = nn.Embedding(VOCABULARY, 16, sparse=True)
            self.context = nn.Embedding(VOCABULARY, 16, sparse=True)
            nn.init.uniform_(self.center.weight, -0.5 / 16, 0.5 / 16)
            nn.init.zeros_(self.context.weight)

        def forward(self, center, context, negative):
            v = self.center(center)
            good = F.logsigmoid((v * self.context(context)).sum(1))
            bad = F.logsigmoid(-torch.bmm(self.context(negative), v.unsqueeze(2)).squeeze(2)).sum(1)
            return -(good + bad).mean()

    model = SkipGram()
    batch = {
        "center": torch.randint(VOCABULARY, (64,)),
        "context": torch.randint(VOCABULARY, (64,)),
        "negative": torch.randint(VOCABULARY, (64, 5)),
    }
    return Program(model, None, batch, torch.optim.SparseAdam(model.parameters(), lr=1e-3))


def character_rnn() -> Program:
    """One-hot letters, an LSTM, the next letter at each place."""

    class CharRNN(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.fc = nn.LSTM(30, 48, 2, dropout=0.2, batch_first=True), nn.Linear(48, 30)

        def forward(self, x):
            y, _ = self.lstm(F.one_hot(x, 30).float())
            return self.fc(y.reshape(-1, 48))

    letters = torch.randint(30, (8, 17))
    model = CharRNN()
    return Program(
        model,
        lambda out, y: F.cross_entropy(out, y.reshape(-1)),
        (letters[:, :-1], letters[:, 1:]),
        torch.optim.Adam(model.parameters(), lr=2e-3),
    )


def question_answering() -> Program:
    """Start and end of the answer: two softmaxes over positions."""

    class QA(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.out = Encoder(), nn.Linear(32, 2)

        def forward(self, tokens):
            start, end = self.out(self.encoder(tokens)).unbind(-1)
            return start, end

    def loss(output, target):
        return (F.cross_entropy(output[0], target[:, 0]) + F.cross_entropy(output[1], target[:, 1])) / 2

    model = QA()
    return Program(
        model, loss, (_tokens(16), torch.randint(12, (16, 2))), torch.optim.AdamW(model.parameters(), lr=3e-5)
    )
