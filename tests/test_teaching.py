"Supervised learning: resumed equals uninterrupted, the loss is TRL's, parts are the whole."
import json
import random

import pytest
import torch

from franken import organism, teaching


@pytest.fixture(scope="module")
def processor(): return organism.build_processor()


def weights(model): return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, processor, kind):
    schedule = teaching.Schedule(steps=4, lr=1e-3, batch=4, warmup=2, optimizer=kind)
    run = lambda out, stop=None: teaching.teach(organism.build_model(3, seed=1), lesson(stop), processor.tokenizer, schedule, seed=0, out=tmp_path / out, every=2)

    def lesson(stop):
        count = iter(range(10**6))

        def example(rng):
            if stop is not None and next(count) >= stop * schedule.batch: raise KeyboardInterrupt
            return organism.SEEING.example(rng)
        return example
    whole = weights(run("whole"))
    with pytest.raises(KeyboardInterrupt): run("broken", stop=3)  # dies after the state of step 2 was kept
    resumed = weights(run("broken"))
    assert all(torch.equal(whole[n], resumed[n]) for n in whole)
    assert [json.loads(line)["step"] for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()] == [2, 4]


def test_our_loss_is_the_loss_of_trl(tmp_path, processor):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    model = organism.build_model(3, seed=1)
    rng = random.Random(0)
    examples = [organism.SEEING.example(rng) for _ in range(6)]
    examples = [e for e in examples if e.image is None] or [organism.Example((("3 + 4 ?", "7"), ("9 - 2 ?", "7")))]
    messages = [[dict(role=role, content=text) for turn in e.turns for role, text in zip(("user", "assistant"), turn)] for e in examples]
    config = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_length=None, assistant_only_loss=True, gradient_checkpointing=False,
                           per_device_train_batch_size=len(examples), dataset_kwargs=None)
    trainer = trl.SFTTrainer(model=model, args=config, train_dataset=Dataset.from_dict(dict(messages=messages)), processing_class=processor.tokenizer)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    model.eval()
    with torch.no_grad():
        theirs = trainer.compute_loss(model, dict(batch))
        ours = teaching.answer_loss(model, organism.collate(examples, processor.tokenizer))
    assert torch.allclose(theirs, ours, atol=1e-5), (theirs, ours)


def test_learning_in_parts_is_learning_at_once(processor):
    rng, grads = random.Random(0), []
    examples = [organism.SEEING.example(rng) for _ in range(8)]
    model = organism.build_model(3, seed=1)
    for parts in (1, 3):
        model.zero_grad()
        loss = teaching.learn(model, examples, processor.tokenizer, parts)
        grads.append((loss, [p.grad.clone() for p in model.parameters()]))
    assert grads[0][0] == pytest.approx(grads[1][0], abs=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads[0][1], grads[1][1]))
